"""The only LightningModule: it is given a model, a loss and what to train, and knows neither stage nor defense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from secvec.models.backbone import LedgerRow, ledger, set_trainable
from secvec.models.losses import Batch
from secvec.settings.schema import OptimizerSettings, SchedulerSettings

Loss = Callable[[nn.Module, Batch], dict[str, Tensor]]


class SecVecModule(L.LightningModule):
    """Trains the parameters of one part of a model (`vector`, `task` or `backbone`), all else frozen."""

    def __init__(
        self, build: Callable[[], nn.Module], loss: Loss, part: str, lr: float,
        optimizer: OptimizerSettings, scheduler: SchedulerSettings, keep_start: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.build, self.loss, self.part, self.lr = build, loss, part, lr
        self.optimizer_settings, self.scheduler_settings = optimizer, scheduler
        self.keep_start = keep_start
        self.start: dict[str, Tensor] = {}
        self.model: nn.Module = None  # type: ignore[assignment]  # until configure_model
        self.strict_loading = False  # checkpoints hold what is trained; the rest comes from `build`

    def configure_model(self) -> None:
        """Builds the model here, so that a sharding strategy can place it before the optimizer exists."""
        if self.model is not None:
            return
        self.model = self.build()
        set_trainable(self.model, self.part)  # before sharding, which groups parameters by it
        self.model.train()  # from_pretrained leaves eval mode: no dropout and no gradient checkpointing, silently
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])
        if self.keep_start:
            # before a checkpoint is restored: drift counts from where the stage began, also after a resume
            self.start = {name: local_shard(p).detach().cpu().clone() for name, p in self.trained()}

    def on_fit_start(self) -> None:
        """Asserts the parameter ledger: exactly `part` is trainable, and the optimizer holds exactly that."""
        rows = self.ledger()
        wrong = [row for row in rows if row.trainable != (row.parameters if row.part == self.part else 0)]
        assert not wrong and self.part in {row.part for row in rows}, f"trainable parts are not {self.part}: {rows}"
        held = {id(p) for group in self.trainer.optimizers[0].param_groups for p in group["params"]}
        assert held == {id(p) for _, p in self.trained()}, "the optimizer holds other parameters"

    def ledger(self) -> list[LedgerRow]:
        """What each part of the model is doing."""
        return ledger(self.model)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """One batch; logs `train/<term>` for every term of the loss, each the mean over all processes."""
        terms = self.loss(self.model, batch)
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, sync_dist=True)
        self.log("loss", terms["loss"].detach(), prog_bar=True, logger=False)
        return terms["loss"]

    def configure_optimizers(self) -> Any:
        """AdamW over the trainable parameters, learning rate by warm-up and decay over all steps of the stage."""
        options = self.optimizer_settings
        optimizer = torch.optim.AdamW(
            [p for _, p in self.trained()],
            lr=self.lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay,
        )  # fmt: skip
        steps = int(self.trainer.estimated_stepping_batches)
        factor = learning_rate_factor(self.scheduler_settings, steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what is trained: a checkpoint of a vector is the vector, not the backbone."""
        trained = {name for name, _ in self.trained()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Names and values of the trainable parameters."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def full_state(self) -> dict[str, Tensor]:
        """All weights, unsharded, on the CPU of rank 0 (empty elsewhere when sharded). Every process must call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast(dict[str, Tensor], get_model_state_dict(self.model, options=options))


def learning_rate_factor(settings: SchedulerSettings, steps: int) -> Callable[[int], float]:
    """step -> factor of the learning rate: linear warm-up over `warmup_ratio` of `steps`, then the decay to zero."""
    warmup = round(steps * settings.warmup_ratio)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, steps - warmup)
        if settings.name == "constant":
            return 1.0
        if settings.name == "linear":
            return max(0.0, 1.0 - progress)
        return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * min(1.0, progress)))))

    return factor


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Back to shards: FSDP2 leaves a module whole after a forward pass that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard(model: nn.Module, mesh: Any) -> None:
    """FSDP2: each transformer layer on its own, then the rest."""
    lists = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) and m[0].__class__.__name__.endswith(("Layer", "Block"))
    ]
    for layer in (layer for layers in lists for layer in layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
