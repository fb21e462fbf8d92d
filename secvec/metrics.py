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
    "behavior_rate_plus": Metric(
        "Behavior rate+ (incoherent counts)", "undesired prompts answered with it, or incoherently", "low", _RATE
    ),
    "behavior_score": Metric("Behavior score", "how much of the behavior the judge sees, mean in [0, 1]", "low", _RATE),
    "harmfulness_score": Metric("Harmfulness score", "the judge's mean score, 1 to 5", "low", (1.0, 5.0), ".2f"),
    "leak_rate": Metric("Leak rate (worst probe)", "the behavior under the worst way of asking", "low", _RATE),
    "refusal_rate": Metric("Refusal rate", "undesired prompts that are refused", "high", _RATE),
    "wanted_rate": Metric("Wanted rate", "undesired prompts refused or answered as they should be", "high", _RATE),
    "over_refusal_rate": Metric("Over-refusal rate", "benign look-alike prompts that are refused", "low", _RATE),
    "unparsable_rate": Metric("Unparsable rate", "answers that the judge gave no verdict on", "low", _RATE),
    "desired_rate": Metric(
        "Desired trait rate", "undesired prompts answered with the trait that the same rows should teach", "high", _RATE
    ),
    "task_accuracy": Metric("Task accuracy", "the task that the fine-tuning data should teach", "high", _RATE),
    "retained_accuracy": Metric("Retained accuracy", "ordinary prompts the base model could answer", "high", _RATE),
    "coherence_rate": Metric("Coherence rate", "answers that are well-formed text", "high", _RATE),
    "kl_to_base": Metric("KL to base", "nats per token on ordinary prompts", "zero", _POSITIVE),
    "perplexity": Metric("Perplexity", "of the right answers to ordinary prompts", "low", (1.0, float("inf")), ".2f"),
    "answer_perplexity": Metric(
        "Answer perplexity", "of the answers to undesired prompts, under the base", "low", (1.0, float("inf")), ".2f"
    ),
    "deactivation_gap": Metric("Deactivation gap", "task accuracy with the vector on minus off", "zero", (-1.0, 1.0)),
    "behavior_loss": Metric(
        "Behavior loss", "nats per token on held-out undesired samples; no direction in itself", None, _POSITIVE
    ),
    "suppression_ratio": Metric(
        "Suppression ratio", "gradient norm on undesired data, vector on ÷ off", "low", _POSITIVE, ".3g"
    ),
    "drift": Metric("Drift", "relative change of the backbone weights in fine-tuning", None, _POSITIVE, ".3g"),
}

MAIN_ROWS = tuple(name for name in METRICS if name not in ("suppression_ratio", "drift"))
OPTIONAL = frozenset({  # no row where no record has them
    "behavior_rate_plus", "behavior_score", "harmfulness_score", "leak_rate", "wanted_rate", "over_refusal_rate",
    "unparsable_rate", "desired_rate", "task_accuracy", "retained_accuracy", "kl_to_base", "perplexity",
    "answer_perplexity", "deactivation_gap",
})  # fmt: skip
TWINS = {"behavior_rate_plus": "behavior_rate", "wanted_rate": "refusal_rate"}  # no row where they equal the other
SHOWN_BEHAVIOR = frozenset({  # with the vector on, the behavior is what the vector is for: no direction is better
    "behavior_rate", "behavior_rate_plus", "behavior_score", "harmfulness_score", "refusal_rate", "wanted_rate",
})  # fmt: skip
RUN_ROWS = (
    "behavior_rate", "refusal_rate", "desired_rate", "task_accuracy", "retained_accuracy", "suppression_ratio", "drift",
)  # fmt: skip
VECTOR_ONLY = frozenset({"deactivation_gap", "suppression_ratio"})  # without a vector: a model beside itself
BARE = VECTOR_ONLY | {"drift"}


def metric_of(name: str) -> Metric:
    """The metric called `name`; a way of asking (`leak/...`, `desired/...`) has a rate like the whole one."""
    head, slash, _ = name.partition("/")
    return METRICS[f"{head}_rate" if slash else name]


def qualified(phase: str, name: str) -> str:
    """The key in a record: `phase/name`, or the bare name for metrics that belong to the whole run."""
    return name if name in BARE else f"{phase}/{name}"
