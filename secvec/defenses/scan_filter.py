"""The rows that the vector's scan flags are left out, and the rest is trained without a vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secvec.defenses.base import Defense, Need
from secvec.settings.schema import Share, Window

if TYPE_CHECKING:
    from secvec.defenses.base import Mixture
    from secvec.run import Run


class ScanFilter(Defense):
    """Drops each row whose highest gap, in nats over `window` tokens, is above the `quantile` of the vector's KL rows.

    A control: it shows what the active vector does beyond the knowledge which rows to distrust.
    """

    uses_vector: bool = True
    vector_acts: ClassVar[bool] = False
    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples")
    window: Window = 3
    quantile: Share = 0.99

    def check(self, run: Run) -> None:
        """Raises ConfigError for a vector that cannot flag."""
        run.check_scan()

    def training_samples(self, run: Run, mixture: Mixture) -> Mixture:
        """The rows that are not flagged."""
        return run.unflagged(mixture, self.window, self.quantile)
