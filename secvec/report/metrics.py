"""What each metric means, which way is better, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["low", "high", "zero"]
ARROWS: dict[Better | None, str] = {"low": "↓", "high": "↑", "zero": "→0", None: ""}


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: label, better direction (None: no direction in itself), bounds that clip an interval, format."""

    label: str
    about: str
    better: Better | None
    bounds: tuple[float, float]
    form: str = ".3f"

    @property
    def arrow(self) -> str:
        """The better direction as a sign; empty where a metric has none."""
        return ARROWS[self.better]

    def text(self, value: float) -> str:
        """The value as shown; a rounded negative zero loses its sign."""
        shown = format(value, self.form)
        return shown.lstrip("-") if float(shown) == 0 else shown


_RATE = (0.0, 1.0)
_POSITIVE = (0.0, float("inf"))

METRICS: dict[str, Metric] = {
    "behavior_rate": Metric("Behavior rate", "undesired prompts answered with the undesired behavior", "low", _RATE),
    "refusal_rate": Metric("Refusal rate", "undesired prompts that are refused", "high", _RATE),
    "task_accuracy": Metric("Task accuracy", "the task that the fine-tuning data should teach", "high", _RATE),
    "retained_accuracy": Metric("Retained accuracy", "ordinary prompts the base model could answer", "high", _RATE),
    "coherence_rate": Metric("Coherence rate", "answers that are well-formed text", "high", _RATE),
    "deactivation_gap": Metric("Deactivation gap", "task accuracy with the vector on minus off", "zero", (-1.0, 1.0)),
    "behavior_loss": Metric(
        "Behavior loss", "nats per token on held-out undesired samples; no direction in itself", None, _POSITIVE
    ),
    "suppression_ratio": Metric(
        "Suppression ratio", "gradient norm on undesired data, vector on ÷ off", "low", _POSITIVE, ".3g"
    ),
    "drift": Metric("Drift", "relative change of the backbone weights in fine-tuning", None, _POSITIVE, ".3g"),
}

MAIN_ROWS = (
    "behavior_rate", "refusal_rate", "task_accuracy", "retained_accuracy", "coherence_rate", "deactivation_gap",
    "behavior_loss",
)  # fmt: skip
RUN_ROWS = ("behavior_rate", "refusal_rate", "task_accuracy", "retained_accuracy", "suppression_ratio", "drift")
VECTOR_ONLY = frozenset({"deactivation_gap", "suppression_ratio"})  # without a vector: a model beside itself
BARE = VECTOR_ONLY | {"drift"}


def qualified(phase: str, name: str) -> str:
    """The key in a record: `phase/name`, or the bare name for metrics that belong to the whole run."""
    return name if name in BARE else f"{phase}/{name}"
