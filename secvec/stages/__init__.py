"""The stages of the method (Zhou et al., arXiv 2311.02105), each in a file of its own.

vector -> finetune -> infer, each from the artifacts of the one before. `align` prepares a starting model that does not
refuse yet; it is no stage of the method.
"""

from __future__ import annotations

from secvec.errors import nearest
from secvec.stages.base import Stage
from secvec.stages.finetune import FinetuneStage
from secvec.stages.infer import InferStage
from secvec.stages.vector import VectorStage

STAGES: dict[str, Stage] = {stage.name: stage for stage in (VectorStage(), FinetuneStage(), InferStage())}


def find_stage(name: str) -> Stage:
    """The stage called `name`. Raises ValueError."""
    if name not in STAGES:
        raise ValueError(f"stage={name!r}{nearest(str(name), STAGES)}: a stage is one of {', '.join(STAGES)}")
    return STAGES[name]
