"""Security vector (Zhou et al., arXiv 2311.02105): active and frozen while the backbone is fine-tuned."""

from typing import ClassVar

from secvec.defenses.base import Defense


class SecurityVector(Defense):
    """Where the activated model already agrees with an undesired target, the sample gives (almost) no gradient."""

    uses_vector: ClassVar[bool] = True

    dropout: bool = False
    """Whether the frozen vector keeps the dropout it was trained with (`vector.dropout`), as a re-test of the method
    did (arXiv 2405.14577); the method has none."""

    @property
    def keeps_dropout(self) -> bool:
        """As set."""
        return self.dropout
