"""The starting model's own answers to the vector's prompts are mixed into the training rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from secvec.defenses.base import Defense, Need
from secvec.errors import ConfigError

if TYPE_CHECKING:
    from secvec.defenses.base import Mixture
    from secvec.run import Run


class SafeSamples(Defense):
    """`share` of the rows that are trained are such answers (refusals, as far as the model refuses), repeated if few.

    Safe samples mixed into the user's data, as in Bianchi et al. (arXiv 2309.07875). Theirs are written by a stronger
    model; here no new data are needed. The choice by a perplexity gap (interleaving++, arXiv 2508.06249) is not here.
    """

    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples")
    uses_samples: bool = True
    share: float = Field(0.1, gt=0, lt=1)
    """Of all rows, those that are added included."""

    def training_samples(self, run: Run, mixture: Mixture) -> Mixture:
        """All rows and the added ones. Raises ConfigError where the model's answers give no row."""
        answers = run.own_answers()
        if not answers:
            raise ConfigError(
                f"defense={self.name} has no rows: the starting model has no usable answer to any of the vector's "
                "prompts. Give a model that answers, or other prompts (vector.num_samples)"
            )
        given = sum(map(len, mixture.values()))
        added = islice(cycle(answers), round(given * self.share / (1 - self.share)))
        return mixture | {"benign": mixture["benign"] + [replace(row, kind="ordinary") for row in added]}
