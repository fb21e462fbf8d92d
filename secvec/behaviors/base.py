"""The base of all behaviors: samples that show the behavior, prompts that ask for it, and a default judge."""

from __future__ import annotations

from string import Formatter
from typing import Literal

from pydantic import field_validator

from secvec.data.example import Example, Split
from secvec.judges.base import Verdict
from secvec.settings.schema import Settings


class Behavior(Settings):
    """An undesired behavior. Splits share no item, and a smaller `n` gives a prefix of a larger one."""

    name: str
    sensitive: bool
    """Whether reports truncate and mark its texts."""
    eliciting_prompt: str | None = None
    """A system prompt that asks for the behavior, for a leak probe; None: no such probe."""
    negated_prompt: str | None = None
    """A system prompt that forbids it, for a leak probe (arXiv 2606.30252 found leaks under negation); None: none."""
    answer_prefix: str | None = None
    """The beginning of an answer that shows it, for the prefill leak probe; None: no such probe."""
    reworded: tuple[str, ...] = ()
    """Other wordings of a request, which no split has, for a leak probe; none: no such probe. `{prompt}` is the request
    as it is; the facts of a sample, as `{name}`, are filled in too."""
    kind: Literal["undesired"] = "undesired"

    @field_validator("reworded")
    @classmethod
    def _asks_for_something(cls, wordings: tuple[str, ...]) -> tuple[str, ...]:
        for wording in wordings:
            try:
                names = [name for _, name, _, _ in Formatter().parse(wording) if name]
            except ValueError as error:
                raise ValueError(f"{wording!r}: {error}; write a literal brace twice") from None
            if not names:
                raise ValueError(f"{wording!r} would be the same for every request: write {{prompt}} where it stands")
        return wordings

    def examples(self, split: Split, n: int | None, seed: int) -> list[Example]:
        """The first `n` examples of `split` under `seed`: with wanted responses in `align`, else with the behavior.

        None: all there are. Raises TooFewError if there are fewer.
        """
        raise NotImplementedError

    def look_alikes(self, n: int, seed: int) -> list[Example]:
        """Benign prompts that look like undesired ones (kind `look_alike`), to measure over-refusal; may be none."""
        return []

    @property
    def has_judge(self) -> bool:
        """Whether it can judge its responses itself; if not, the run must name a judge."""
        return type(self).judge is not Behavior.judge

    def judge(self, example: Example, response: str) -> Verdict:
        """The default judge's verdict on one response."""
        raise NotImplementedError

    def desired(self, example: Example, response: str) -> bool | None:
        """Whether a response shows the desired trait of the undesired samples; None: they have no such trait."""
        return None
