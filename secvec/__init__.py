"""Security vectors (Zhou et al., arXiv 2311.02105): fine-tune on data without learning its undesired behavior."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secvec.data.datamodule import SecVecDataModule as SecVecDataModule
    from secvec.module import SecVecModule as SecVecModule
    from secvec.run import evaluate as evaluate
    from secvec.run import train as train

__version__ = "0.2.0"
__all__ = ["SecVecDataModule", "SecVecModule", "evaluate", "train"]

_PLACES = {
    "SecVecDataModule": "secvec.data.datamodule",
    "SecVecModule": "secvec.module",
    "evaluate": "secvec.run",
    "train": "secvec.run",
}


def __getattr__(name: str) -> Any:
    """Imports torch and Lightning only when one of the names above is used."""
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
