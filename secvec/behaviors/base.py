"""What every behavior is: samples that show it, prompts that ask for it, and its default judge."""

from __future__ import annotations

from typing import Literal

from secvec.data.example import Example, Split
from secvec.judges.base import Verdict
from secvec.settings.schema import Settings


class Behavior(Settings):
    """Base of all behaviors. Splits share no item, and a smaller `n` gives a prefix of a larger one."""

    name: str
    sensitive: bool
    """Whether reports truncate and mark its text."""
    eliciting_prompt: str | None = None
    """A system prompt that asks for the behavior, for leak probes; None: that probe is left out."""
    negated_prompt: str | None = None
    """A system prompt that forbids it (arXiv 2606.30252 found leaks under negation); None: left out."""
    answer_prefix: str | None = None
    """How an answer that shows it begins, for the prefix-filled leak probe; None: left out."""
    kind: Literal["undesired"] = "undesired"

    def examples(self, split: Split, n: int, seed: int) -> list[Example]:
        """The first `n` examples of `split` under `seed`: wanted responses in `align`, the behavior elsewhere."""
        raise NotImplementedError

    def look_alikes(self, n: int, seed: int) -> list[Example]:
        """Benign prompts that look like the undesired ones (kind `look_alike`), for over-refusal; may be none."""
        return []

    def judge(self, example: Example, response: str) -> Verdict:
        """The default judge of one response."""
        raise NotImplementedError

    def desired(self, example: Example, response: str) -> bool | None:
        """Whether a response to an undesired prompt shows the trait that the same rows should teach; None: no such."""
        return None
