"""The one unit of data: a prompt, the response to learn or to compare with, and what kind of data it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

Kind = Literal["undesired", "task", "ordinary", "look_alike", "neutral"]
"""`task` is to be learned, `ordinary` must stay as it is, `neutral` too but is asked nothing: for a KL term alone."""
KINDS: tuple[Kind, ...] = ("undesired", "task", "ordinary", "look_alike", "neutral")

Split = Literal["align", "vector", "validation", "finetune", "test"]
SPLITS: tuple[Split, ...] = ("align", "vector", "validation", "finetune", "test")

OWNER = "behavior"
"""The fact that says whose an undesired sample is, where there are several behaviors."""


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its response.

    `messages` are chat turns `(role, content)`, the last one the user's; `response` is the assistant's answer.
    `facts` holds what a judge needs to know of the prompt (for example the ingredients that a recipe must name);
    `source` says where it came from (`file:line`), for error messages.
    """

    messages: tuple[tuple[str, str], ...]
    response: str
    kind: Kind
    facts: dict[str, str] = field(default_factory=dict)
    source: str = ""

    @property
    def prompt(self) -> str:
        """The last user turn, as plain text."""
        return self.messages[-1][1]


class Stream(Protocol):
    """A seeded source of examples of one kind. Splits share no item; a smaller `n` gives a prefix of a larger one."""

    @property
    def kind(self) -> Kind:
        """What its examples are."""
        ...

    def examples(self, split: Split, n: int, seed: int) -> list[Example]:
        """The first `n` distinct examples of `split` under `seed`; raises DataError when there are fewer."""
        ...
