"""Security vector (Zhou et al., arXiv 2311.02105): active and frozen while the backbone is fine-tuned."""

from typing import ClassVar

from secvec.defenses.base import Defense, Need


class SecurityVector(Defense):
    """Where the activated model already agrees with an undesired target, the sample gives (almost) no gradient."""

    uses_vector: bool = True
    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples")


class RefittedVector(SecurityVector):
    """A security vector that is trained again, on the current backbone, before each cycle after the first."""

    refits_vector: ClassVar[bool] = True
