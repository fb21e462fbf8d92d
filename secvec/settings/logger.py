"""Where the numbers of a run go besides its folder."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from secvec.errors import nearest
from secvec.settings.messages import renamed
from secvec.settings.schema import Settings
from secvec.settings.target import Target


class CsvSettings(Settings):
    """metrics.csv in the run folder, which every run has: there is nothing to set."""


class TensorBoardSettings(Settings):
    """TensorBoard files in the run folder."""

    num_predictions: Annotated[int, Field(ge=0)]
    """Answers of each phase and kind of prompt in the table of predictions; 0: no table. Sensitive texts are cut."""


class WandbSettings(Settings):
    """A run at Weights & Biases."""

    project: str
    entity: str | None
    offline: bool
    num_predictions: Annotated[int, Field(ge=0)]
    """As for TensorBoard."""
    upload_vector: bool
    """Whether the weights of the vector are sent, and not only their hash: with it active, a model misbehaves."""


class LightningLoggerSettings(Target):
    """A logger of Lightning, or any class derived from its base, with its arguments."""

    base = "lightning.pytorch.loggers.Logger"


class LoggerSettings(Settings):
    """The loggers of a run by name: ours, and any of Lightning's by `_target_`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, LightningLoggerSettings]

    csv: CsvSettings | None = None
    tensorboard: TensorBoardSettings | None = None
    wandb: WandbSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _others_have_a_target(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            if name not in cls.model_fields and not (isinstance(value, dict | Target) and "_target_" in dict(value)):
                known = sorted(cls.model_fields)
                raise ValueError(
                    f"there is no logger {name!r}{nearest(name, known)}; known: {', '.join(known)}, "
                    f"and any of Lightning's by its `_target_`{renamed(f'logger.{name}')}"
                )
        return given
