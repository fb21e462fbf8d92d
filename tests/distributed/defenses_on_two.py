"""Trains with each defense that acts on the step, by DDP and by FSDP2: `python defenses_on_two.py FOLDER`.

Lightning starts the second process. Each training is cut off by a checkpoint and goes on from it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from secvec.data.batch import Batch
from secvec.defenses.anchored_vector import AnchoredVector
from secvec.defenses.base import Defense
from secvec.defenses.booster import Attenuated
from secvec.defenses.kl_to_base import KlToBase
from secvec.defenses.l2_to_base import L2ToBase
from secvec.defenses.labelled_vector import LabelledVector
from secvec.defenses.lisa import Lisa
from secvec.defenses.safegrad import SafeGrad
from secvec.defenses.security_vector import SecurityVector
from secvec.defenses.vaccine import Perturbed
from secvec.models.sharding import trained_state
from secvec.models.vector import attach_new_vector, save_adapter
from secvec.settings.trainer import TrainerSettings
from tests.contracts.test_defense_hooks import fit, make_batch
from tests.contracts.test_vector import LORA, disturb, fresh

DEFENSES: list[Defense] = [
    KlToBase(name="kl_to_base"),
    L2ToBase(name="l2_to_base", weight=1.0),
    SafeGrad(name="safegrad"),
    Lisa(name="lisa", safe_steps=1, data_steps=3),
    Perturbed(name="vaccine", rho=1.0),
    Attenuated(name="booster", weight=5.0, step=0.1, extra_batch_size=1),
    SecurityVector(name="security_vector"),
    AnchoredVector(name="anchored_vector", weight=5.0, every=2),
    AnchoredVector(name="anchored_vector_kl", weight=5.0, kl=True),
    LabelledVector(name="labelled_vector"),
]
DATA = [["First grind the frost root.", "oil"], ["make soup", "root"]]
SAFE = [["amber oil", "frost"], ["make soup from amber oil", "soup"]]


def batches(defense: Defense, rank: int | None) -> list[Batch]:
    """Two batches of two rows and, for a defense that reads such, two extra ones; a process has one of each.

    The first row of each batch is labelled undesired.
    """
    mine = slice(None) if rank is None else slice(rank, rank + 1)
    extra = [safe[mine] if defense.extra_batch_size else [] for safe in SAFE]
    made = [make_batch(*data[mine], *safe, extra=len(safe)) for data, safe in zip(DATA, extra, strict=True)]
    for batch in made:
        batch["undesired"][0] = rank != 1
    return made


def train(defense: Defense, folder: Path, rank: int | None, strategy: str = "auto") -> dict[str, torch.Tensor]:
    """Two epochs, a checkpoint, two more: the weights, on the first process."""
    devices = 1 if rank is None else 2
    settings = TrainerSettings(
        accelerator="cpu", devices=devices, strategy=strategy, precision="32-true", gradient_clip_val=None
    )  # type: ignore[arg-type]
    rows, vector = batches(defense, rank), None
    if defense.uses_vector:
        vector = new_vector(folder / f"vector-{dist.get_rank() if dist.is_initialized() else 0}")
    checkpoint = folder / f"{defense.name}-{strategy}.ckpt"
    fit(defense, lr=0.01, batches=rows, vector=vector, **settings.hardware()).trainer.save_checkpoint(checkpoint)
    module = fit(defense, 4, checkpoint, 0.01, rows, vector, **settings.hardware())
    state = trained_state(module.model)
    plain = {name: name.removeprefix("base_model.model.").replace(".base_layer", "") for name in state}  # PEFT's names
    return {plain[name]: weight.clone() for name, weight in state.items()}


def new_vector(folder: Path) -> Path:
    """A vector that changes what the model says; the same in every process."""
    model = attach_new_vector(fresh(), LORA, dropout=0.0)
    disturb(model, "vector")
    # under a large one the weights would run away, and rounding with them
    state = {name: value * 0.2 if "lora" in name else value for name, value in model.state_dict().items()}
    save_adapter(model, state, "vector", folder)
    return folder


if __name__ == "__main__":
    from secvec.training.trainer import launch

    out = Path(sys.argv[1])
    launch(TrainerSettings(accelerator="cpu", devices=2, strategy="ddp", precision="32-true", gradient_clip_val=None))
    for strategy in ("ddp", "fsdp"):
        for defense in DEFENSES:
            weights = train(defense, out, dist.get_rank(), strategy)
            if dist.get_rank() == 0:
                torch.save(weights, out / f"{defense.name}-{strategy}.pt")
