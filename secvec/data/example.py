"""The unit of data, an example, and the base of the streams that examples are drawn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from secvec.settings.schema import Count, Settings

Kind = Literal["undesired", "task", "ordinary", "look_alike", "neutral"]
"""`task` is to be learned; `ordinary` is to stay as it is, and so is `neutral`, which is not evaluated."""
KINDS: tuple[Kind, ...] = ("undesired", "task", "ordinary", "look_alike", "neutral")

Split = Literal["align", "vector", "validation", "finetune", "test"]
SPLITS: tuple[Split, ...] = ("align", "vector", "validation", "finetune", "test")

AnswerMetric = Literal["exact", "contains", "number", "rougeL", "code", "judge", "none"]
"""How answers are compared with their references (`secvec.evaluation.answer_metrics`); `none`: by the loss alone."""
GRADED: tuple[AnswerMetric, ...] = ("rougeL", "code", "judge", "none")
"""They know degrees, or nothing, but not right and wrong."""

OWNER = "behavior"
"""The fact that names the behavior of an undesired sample, if the run has several."""


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its response.

    `messages` are chat turns `(role, content)`, the last one the user's; `response` is the assistant's answer.
    `facts` holds what a judge must know about the prompt (for example the ingredients that a recipe must name);
    `source` is the origin (`file:line`), for error messages.
    """

    messages: tuple[tuple[str, str], ...]
    response: str
    kind: Kind
    facts: dict[str, str] = field(default_factory=dict)
    source: str = ""
    metric: AnswerMetric = "exact"
    """How a response to a benign prompt is compared with the reference."""
    max_new_tokens: int | None = None
    """Most tokens of a generated response; None: `evaluation.max_new_tokens`."""

    @property
    def prompt(self) -> str:
        """The last user turn, as plain text."""
        return self.messages[-1][1]


class Stream(Settings):
    """Base of all benign streams: a seeded source of examples of one kind.

    Splits share no item, and a smaller `n` gives a prefix of a larger one.
    """

    kind: Literal["task", "ordinary", "neutral"]
    """Kind of its examples."""
    metric: AnswerMetric = "exact"
    """How responses to its test prompts are compared with the references. The loss is measured always."""
    max_new_tokens: Count | None = None
    """Most tokens of a response to its test prompts; None: `evaluation.max_new_tokens`."""

    def examples(self, split: Split, n: int, seed: int) -> list[Example]:
        """The first `n` distinct examples of `split` under `seed`. Raises DataError if there are fewer."""
        raise NotImplementedError
