"""The unit of data, an example, and the base of the streams that examples are drawn from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args
from unicodedata import normalize

from secvec.settings.schema import Count, Settings, Share

Kind = Literal["undesired", "task", "ordinary", "look_alike", "neutral", "untrusted"]
"""`task` is to be learned; `ordinary` is to stay as it is, and so is `neutral`, which is for the KL term alone.
`untrusted` is fine-tuning data of which nobody knows which rows are undesired; it is measured as the task."""

Split = Literal["align", "vector", "validation", "finetune", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

AnswerMetric = Literal["exact", "contains", "number", "rougeL", "code", "judge", "none"]
"""How answers are compared with their references (`secvec.evaluation.answer_metrics`); `none`: by the loss alone."""
UNSCORED: tuple[AnswerMetric, ...] = ("judge", "none")
"""No rule compares an answer with its reference."""
GRADED: tuple[AnswerMetric, ...] = ("rougeL", "code", *UNSCORED)
"""They know degrees, or nothing, but not right and wrong."""

OWNER = "behavior"
"""The fact that names the behavior of an undesired sample, or the stream of a held-out benign one, of several."""


class Shares(Settings):
    """The share of the prompts that each split gets; only the proportions count."""

    align: Share = 0.35
    vector: Share = 0.1
    validation: Share = 0.05
    finetune: Share = 0.35
    test: Share = 0.15


def same_text(text: str) -> str:
    """`text` without what makes no other text of it: case, runs of white space, and how an accent is encoded."""
    return " ".join(normalize("NFC", text.casefold()).split())


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its response.

    `messages` are chat turns `(role, content)` up to the answer; `response` is the assistant's answer.
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
    cut: bool = False
    """Whether the response goes on after its last token, as one that a limit of tokens has cut: it is trained without
    the end of an answer."""

    @property
    def prompt(self) -> str:
        """The turn that is answered, as plain text."""
        return self.messages[-1][1]

    def with_system(self, text: str) -> Example:
        """The same with this system prompt in place of its own."""
        turns = [turn for turn in self.messages if turn[0] != "system"]
        return replace(self, messages=(("system", text), *turns))

    def following(self, row: Example) -> Example:
        """The same as a later turn of `row`'s conversation, under its system prompt if it has one."""
        system = [turn for turn in self.messages if turn[0] == "system"]
        turns = [turn for turn in self.messages if turn[0] != "system"]
        before = row.messages if row.messages[0][0] == "system" else (*system, *row.messages)
        return replace(self, messages=(*before, ("assistant", row.response), *turns))

    @property
    def key(self) -> tuple[tuple[str, str], ...]:
        """Equal for the same prompt: the only meaning of "same" in splits, duplicates and `check_disjoint`."""
        return tuple((role, same_text(content)) for role, content in self.messages)

    @property
    def opening(self) -> tuple[tuple[str, str], ...]:
        """The key of the turns before the first answer to the user, which all samples of a conversation share.

        A greeting of the assistant, which many conversations have in common, is none.
        """
        roles = [role for role, _ in self.messages]
        asked = roles.index("user") if "user" in roles else 0
        return self.key[: roles.index("assistant", asked) if "assistant" in roles[asked:] else None]


class Stream(Settings):
    """Base of all benign streams: a seeded source of examples of one kind.

    Splits share no item, and a smaller `n` gives a prefix of a larger one.
    """

    kind: Literal["task", "ordinary", "neutral", "untrusted"]
    """Kind of its examples."""
    metric: AnswerMetric = "exact"
    """How responses to its test prompts are compared with the references. The loss is measured always."""
    max_new_tokens: Count | None = None
    """Most tokens of a response to its test prompts; None: `evaluation.max_new_tokens`."""

    def examples(self, split: Split, n: int | None, seed: int) -> list[Example]:
        """The first `n` distinct examples of `split` under `seed`; None: all. Raises TooFewError if there are fewer."""
        raise NotImplementedError
