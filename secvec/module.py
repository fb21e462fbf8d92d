"""The LightningModule of the method: one class, three stages."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from pydantic import TypeAdapter
from torch import Tensor, nn

from secvec.data.batch import Batch
from secvec.data.datamodule import StepLoader
from secvec.defenses.base import Defense
from secvec.errors import ConfigError
from secvec.evaluation.generation import GenerationBackend
from secvec.models.backbone import Backbone, LedgerRow, ledger, set_trainable
from secvec.models.kept import keep_weights
from secvec.models.outline import layers
from secvec.models.sharding import local_shard, reshard, shard
from secvec.models.vector import has_vector, part_of, vector_off
from secvec.settings.messages import checked
from secvec.settings.schema import LoraSettings, ModelSettings, VectorLora
from secvec.settings.target import Plugin, to_target
from secvec.settings.trainer import OptimizerSettings, SchedulerSettings
from secvec.stages import find_stage
from secvec.training.callbacks import logs
from secvec.training.losses import response_loss
from secvec.training.optim import build_optimizer, build_schedule, check_loss_scale

SECURITY_VECTOR = "secvec.defenses.security_vector.SecurityVector"
"""The defense of a fine-tune with a vector, where none is named."""


class SecVecModule(L.LightningModule):
    """A security vector in one of its three stages (Zhou et al., arXiv 2311.02105).

    - `stage="vector"` trains a new LoRA, the vector, on a frozen backbone;
    - `stage="finetune"` trains the backbone, or a task LoRA beside it, with the frozen vector active;
    - `stage="infer"` trains nothing: `Trainer.predict` answers prompts, with the vector if one is given.

    Batches come from `SecVecDataModule`, which asks the module for its stage and its tokenizer.
    """

    def __init__(
        self,
        stage: str,
        backbone: Backbone | ModelSettings | Mapping[str, Any] | str | Path,
        vector: VectorLora | Mapping[str, Any] | str | Path | None = None,
        defense: Defense | Mapping[str, Any] | None = None,
        tune: LoraSettings | Mapping[str, Any] | None = None,
        optimizer: OptimizerSettings | Mapping[str, Any] | None = None,
        scheduler: SchedulerSettings | Mapping[str, Any] | None = None,
    ):
        """All arguments are kept as plain hyperparameters; `load_from_checkpoint` makes the same module again.

        Args:
            stage: "vector", "finetune" or "infer".
            backbone: a Hugging Face folder or hub id, or settings with the type of the weights and the like.
            vector: for "vector" the LoRA to train and its loss; afterwards the folder of a trained vector, or None.
            defense: what is active in "finetune"; None: `SecurityVector` with a vector, else nothing.
            tune: a task LoRA that "finetune" trains in place of the backbone; None: the whole backbone.
            optimizer: None: AdamW at the rates of conf/recipe/llm.yaml: "vector" 1e-3, or the `lr` of VectorSettings,
                "finetune" 2e-5, or 2e-4 with `tune`.
            scheduler: None: a constant learning rate.

        Raises:
            ValueError: for an unknown stage, or a vector that is of no use in this stage.
            SecVecError: for settings or folders that are wrong.
        """
        super().__init__()
        self.stage = find_stage(stage)
        self.backbone = Backbone.of(backbone)
        self.vector = self.stage.check_vector(vector)
        if isinstance(defense, str):
            raise ConfigError(
                f"defense={defense!r} is a name: give an object, as SecurityVector(name='security_vector'), or the "
                "settings of its yaml in conf/defense/, with their _target_"
            )
        if defense is None:
            defense = {"_target_": SECURITY_VECTOR, "name": "security_vector"} if vector else Defense(name="none")
        self.defense = TypeAdapter(Plugin[Defense]).validate_python(defense)
        self.tune = None if tune is None else checked(LoraSettings, tune, "tune")
        adamw = {"_target_": "torch.optim.AdamW", "lr": self.stage.default_lr(vector, tune)}
        self.optimizer_settings = checked(OptimizerSettings, optimizer or adamw, "optimizer")
        self.scheduler_settings = checked(
            SchedulerSettings, scheduler or {"name": "constant", "warmup_ratio": 0.0}, "scheduler"
        )
        self.generation = GenerationBackend()
        self.behavior_name = ""
        """For the card of the saved vector."""
        self.keep_start = False
        """Whether the trained weights are copied before the first step, for what measures their drift."""
        self.start: dict[str, Tensor] = {}
        self.before_checkpoint: Callable[[], None] | None = None
        """Raises DivergedError where the present weights must not be saved; set by `StopWhenDiverged`."""
        self._place_in_data: Mapping[str, Any] | None = None
        self.model: nn.Module = None  # type: ignore[assignment]  # until configure_model
        self.strict_loading = False  # a checkpoint holds what is trained; the rest comes from the folders
        self.save_hyperparameters(
            {
                "stage": stage,
                "backbone": self.backbone.hyperparameters(),
                "vector": str(self.vector) if isinstance(self.vector, Path) else _plain(self.vector),
                "defense": to_target(self.defense),
                "tune": _plain(self.tune),
                "optimizer": _plain(self.optimizer_settings),
                "scheduler": _plain(self.scheduler_settings),
            }
        )

    @property
    def part(self) -> str | None:
        """The part of the model that this stage trains: `vector`, `task`, `backbone`, or None."""
        return self.stage.part(self)

    def configure_model(self) -> None:
        """Builds the model here, so that a sharding strategy can place it before the optimizer exists."""
        if self.model is not None:
            return
        mesh = self.device_mesh
        backbone = self.backbone.load() if mesh is None else self.backbone.outline()
        self.model = self.stage.prepare(self, backbone)
        set_trainable(self.model, self.part)  # before sharding, which groups parameters by it
        # from_pretrained leaves eval mode: without this no dropout and no gradient checkpointing, silently
        self.model.train(self.part is not None)
        if self.part and (backend := self.backbone.settings.compile):
            for layer in layers(self.model):  # the output head changes its inputs in every step
                layer.compile(backend=backend, dynamic=True)
        if mesh is not None:
            shard(self.model, mesh)
        if self.stage.keeps_weights(self):
            keep_weights(self.model)
        if self.keep_start:
            # before a checkpoint is restored: drift counts from where the stage began, also after a resume
            self.start = {name: local_shard(p).detach().cpu().clone() for name, p in self.trained()}

    def on_fit_start(self) -> None:
        """Asserts the parameter ledger: exactly `part` is trainable, and the optimizer holds exactly that.

        Raises ConfigError for an optimizer or a defense that gives wrong steps where the Trainer scales the loss.
        """
        rows = self.ledger()
        wrong = [row for row in rows if row.trainable != (row.parameters if row.part == self.part else 0)]
        assert not wrong and self.part in {row.part for row in rows}, f"trainable parts are not {self.part}: {rows}"
        held = {id(p) for group in self.trainer.optimizers[0].param_groups for p in group["params"]}
        assert held == {id(p) for _, p in self.trained()}, "the optimizer holds other parameters"
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            try:
                check_loss_scale(self.trainer.optimizers[0], self.defense)
            except ValueError as error:
                raise ConfigError(str(error)) from None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch; logs `train/<term>` for every term of the loss, the mean over all processes and over the step.

        Between two steps that are logged nothing waits for the device or for other processes. So the loss is not in
        Lightning's progress bar, which reads it at every step.
        """
        batch["step"], parts = self.trainer.global_step, self.trainer.accumulate_grad_batches
        self._step_batches: list[Batch] = [*(self._step_batches if batch_idx % parts else []), batch]
        terms = self.stage.loss(self, batch)
        before: dict[str, Any] = self._step_terms if batch_idx % parts else dict.fromkeys(terms, 0.0)
        self._step_terms: dict[str, Tensor] = {n: before[n] + term.detach() / parts for n, term in terms.items()}
        self._log_terms(self._step_terms)
        return terms["loss"]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Lets the stage change the gradients: they are accumulated, and not clipped yet."""
        with self.trainer.precision_plugin.forward_context():
            terms = self.stage.gradients(self, self._step_batches)
        self._log_terms(terms)

    def _log_terms(self, terms: dict[str, Tensor]) -> None:
        """Between two steps that are logged nothing waits for the device or for other processes."""
        if logs(self.trainer, self.trainer.global_step + 1):
            terms = {name: self.trainer.strategy.reduce(term.clone(), reduce_op="mean") for name, term in terms.items()}
        self.log_dict({f"train/{name}": term for name, term in terms.items()})

    def validation_step(self, batches: dict[str, Batch | None], batch_idx: int) -> None:
        """Nats per response token of held-out samples by kind: `val/<kind>_loss` with the vector off.

        With a vector, `val/<kind>_loss_vector_on` too. Every process has the same samples.
        """
        for kind, batch in batches.items():
            if batch is None:
                continue
            with vector_off(self.model):
                self._log_validation(f"val/{kind}_loss", batch)
            if has_vector(self.model):
                self._log_validation(f"val/{kind}_loss_vector_on", batch)
        reshard(self.model)

    def _log_validation(self, name: str, batch: Batch) -> None:
        loss, size = response_loss(self.model, batch), len(batch["input_ids"])
        self.log(name, loss, batch_size=size, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[Any]:
        """The outputs of a batch, which is a function of the module: responses to prompts, or losses of samples."""
        outputs: list[Any] = batch(self)
        return outputs

    def configure_optimizers(self) -> Any:
        """The optimizer over the trainable parameters, and the learning rate over all steps of the stage."""
        if self.part is None:
            raise ValueError(f"stage={self.stage.name} trains nothing: use Trainer.predict or Trainer.validate")
        optimizer = build_optimizer(self.optimizer_settings, (p for _, p in self.trained()), self.optimizer_settings.lr)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):  # it ends by the clock, or never
            if self.scheduler_settings.name != "constant" or self.scheduler_settings.warmup_ratio:
                raise ConfigError(
                    f"scheduler={self.scheduler_settings.name} spreads the learning rate over all steps, and the "
                    "Trainer does not know how many there are: give it max_epochs or max_steps"
                )
            return optimizer
        steps = int(steps)
        schedule = build_schedule(self.scheduler_settings, optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what is trained (of a vector the vector, not the backbone) and the place in the data."""
        if self.before_checkpoint:
            self.before_checkpoint()
        trained = {name for name, p in self.named_parameters() if p.requires_grad or part_of(name) == "kept"}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        if isinstance(loader := self.trainer.train_dataloader, StepLoader):
            checkpoint["data"] = loader.state_dict()  # Lightning adds it too, but where it may not read it again

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Outside a Trainer, and where weights are averaged: those not in the checkpoint are those of the folders."""
        if self._trainer is None or "averaging_state" in checkpoint:  # WeightAveraging asks for all
            checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]
        if self._trainer is None:
            return
        if self.trainer.training:  # a new training begins at the first rows
            self._place_in_data = checkpoint.get("data")

    def on_train_start(self) -> None:
        """Goes on in the data, also with a Trainer of the user's own: there is a loader only now."""
        place, self._place_in_data = self._place_in_data, None
        if place and isinstance(loader := self.trainer.train_dataloader, StepLoader):
            loader.load_state_dict(place)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Names and values of the trainable parameters."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def ledger(self) -> list[LedgerRow]:
        """What each part of the model is doing."""
        return ledger(self.model)

    def release(self) -> None:
        """Frees the model, and what its Trainer keeps of it. Who uses the module again loads the model again."""
        if self.model is None:
            return
        one = weakref.ref(next(self.model.parameters()))
        self.model, self.start, self.before_checkpoint, self._trainer = None, {}, None, None  # type: ignore[assignment]
        if one() is not None:  # adapters, wrappers, a Trainer and its optimizer refer to each other in circles
            gc.collect()

    def save(self, folder: str | Path) -> None:
        """Writes what the stage has trained below `folder`: `vector/`, or `backbone/` (and `task/`).

        Every process must call it; the first one writes.
        """
        self.stage.save(self, Path(folder))


def _plain(settings: Any) -> dict[str, Any] | None:
    return None if settings is None else settings.model_dump(mode="json", by_alias=True)
