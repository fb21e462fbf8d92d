"""Security vectors (Zhou et al., arXiv 2311.02105): fine-tune on data without learning its undesired behavior."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secvec.config.schema import DataSettings as DataSettings
    from secvec.config.schema import VectorSettings as VectorSettings
    from secvec.data.datamodule import SecVecDataModule as SecVecDataModule
    from secvec.module import SecVecModule as SecVecModule
    from secvec.run import evaluate as evaluate
    from secvec.run import train as train
    from secvec.settings.schema import EvaluationSettings as EvaluationSettings
    from secvec.settings.schema import FinetuneSettings as FinetuneSettings
    from secvec.settings.schema import GateSettings as GateSettings

__version__ = "0.2.0"

_PLACES = {
    "DataSettings": "secvec.config.schema",
    "EvaluationSettings": "secvec.settings.schema",
    "FinetuneSettings": "secvec.settings.schema",
    "GateSettings": "secvec.settings.schema",
    "SecVecDataModule": "secvec.data.datamodule",
    "SecVecModule": "secvec.module",
    "VectorSettings": "secvec.config.schema",
    "evaluate": "secvec.run",
    "train": "secvec.run",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    """Imports torch and Lightning only when one of the names above is used."""
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
