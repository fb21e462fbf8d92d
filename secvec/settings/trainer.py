"""Lightning's Trainer, its callbacks and loggers, optimizer and schedule, and what is watched during training."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from secvec.errors import nearest, one_line
from secvec.settings.conf import shipped
from secvec.settings.messages import renamed
from secvec.settings.schema import Count, Rate, Settings, Share
from secvec.settings.target import Target, built, check_arguments

OURS = {
    "logger": "choose loggers by their group, as in logger=[csv,wandb]",
    "callbacks": "choose callbacks by their group, as in callbacks=early_stopping",
    "default_root_dir": "everything is written below paths.outputs",
    "enable_checkpointing": "`checkpoint` says when one is written; callbacks=best_checkpoint keeps the best",
    "use_distributed_sampler": "our own sampler divides each batch over the processes",
    "barebones": "a run needs its callbacks and loggers",
}
"""Arguments of the Trainer that this program gives, and what to set instead."""


class TrainerSettings(Settings, extra="allow"):
    """Arguments of `lightning.Trainer`: any of them except those in `OURS`. Lightning checks their values here.

    `replicas` is ours.
    """

    accelerator: Literal["cpu", "gpu", "auto"]
    devices: Count | Literal["auto"] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """Processes of a node; `auto`: one for each GPU; a list: the GPUs by their numbers."""
    num_nodes: Count = 1
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true", "fsdp"]
    """`fsdp`: FSDP2, Lightning's ModelParallelStrategy."""
    replicas: Count = 1
    """Under `fsdp`, copies of the weights, each sharded over its share of the processes (HSDP). Several nodes:
    `num_nodes`, so that shards are gathered within a node."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"]
    gradient_clip_val: Rate | None
    accumulate_grad_batches: Count = 1
    max_epochs: Count | None = None
    """Of every training; None: as many as its stage says."""

    @model_validator(mode="after")
    def _several_devices_need_a_strategy(self) -> TrainerSettings:
        if isinstance(self.devices, list) and (self.accelerator == "cpu" or len({*self.devices}) < len(self.devices)):
            raise ValueError(f"devices={self.devices} must be GPUs, each once; on the CPU it is a number of processes")
        if self.strategy == "auto" and (self.num_nodes > 1 or self.num_processes not in (1, None)):
            raise ValueError(f"devices={self.devices} needs a strategy: choose trainer=ddp or trainer=fsdp")
        if self.strategy == "fsdp" and self.precision in ("64-true", "16-mixed"):
            raise ValueError(f"strategy=fsdp takes no {self.precision}: choose 32-true, bf16-mixed or bf16-true")
        if self.strategy == "fsdp" and self.accelerator == "cpu" and self.num_processes is None:
            raise ValueError("strategy=fsdp on the CPU needs a number of processes: set devices")
        extra = self.model_extra or {}
        if nothing := [f"{name}=0" for name in ("limit_train_batches", "max_steps") if extra.get(name) == 0]:
            raise ValueError(f"{' and '.join(nothing)} would train nothing: leave it out, or give a number above 0")
        for name in ("limit_train_batches", "limit_val_batches", "overfit_batches", "val_check_interval"):
            value = extra.get(name)
            if isinstance(value, str | bool):
                raise ValueError(f"{name}={value}: give a number of batches, or a share of them from 0 to 1")
            if name in ("limit_val_batches", "overfit_batches") and isinstance(value, float) and 0 < value < 1:
                raise ValueError(f"{name}={value}: validation has one batch of each kind, so give a number of batches")
        for name, least in (("check_val_every_n_epoch", 1), ("num_sanity_val_steps", -1)):
            value = extra.get(name, least)
            if not (value is None and least == 1) and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value}: give a whole number from {least} on{' or null' * (least == 1)}")
        limit, parts = extra.get("limit_train_batches"), self.accumulate_grad_batches
        if isinstance(limit, int) and limit % parts:
            raise ValueError(
                f"limit_train_batches={limit} is no multiple of accumulate_grad_batches={parts}: the last step would "
                "be too small"
            )
        if self.replicas > 1 and self.strategy != "fsdp":
            raise ValueError(f"replicas={self.replicas} are copies of sharded weights: choose trainer=fsdp")
        if self.num_processes and self.num_processes * self.num_nodes % self.replicas:
            raise ValueError(
                f"replicas={self.replicas} must divide the {self.num_processes * self.num_nodes} processes "
                "(devices x num_nodes)"
            )
        return self

    @model_validator(mode="after")
    def _lightning_takes_them(self) -> TrainerSettings:
        usual = dict(value for file in shipped("trainer") for value in file.items())
        others = {k: v for k, v in (self.model_extra or {}).items() if k not in usual or usual[k] != v}
        if not others:
            return self
        import lightning as L  # slow to import
        from lightning.pytorch.plugins.environments import LightningEnvironment

        if taken := [f"{name} cannot be set: {OURS[name]}" for name in others if name in OURS]:
            raise ValueError("; ".join(taken))
        if old := [text for name in others if (text := renamed(f"trainer.{name}"))]:
            raise ValueError("; ".join(text.removeprefix("; ") for text in old))
        check_arguments("lightning.Trainer", L.Trainer, others, OURS)
        # one process on the CPU: a Trainer that is made for other hardware looks for it
        here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
        alone = {"logger": False} | ({} if "plugins" in others else {"plugins": LightningEnvironment()})
        level = logging.root.manager.disable
        logging.disable(logging.INFO)
        try:
            with warnings.catch_warnings(action="ignore"):
                L.Trainer(
                    **self.model_dump(exclude={"replicas"}) | {k: built(v) for k, v in others.items()} | here | alone
                )
        except Exception as error:
            raise ValueError(one_line(error)) from None
        finally:
            logging.disable(level)
        return self

    @property
    def num_processes(self) -> int | None:
        """Of a node; None: as many as it has GPUs."""
        if isinstance(self.devices, list):
            return len(self.devices)
        return None if self.devices == "auto" else self.devices

    def arguments(self, epochs: int | None = None) -> dict[str, Any]:
        """Keyword arguments of `lightning.Trainer`; `epochs` counts where `max_epochs` is None."""
        given = {name: built(value) for name, value in self.model_dump(exclude={"replicas"}).items()}
        given |= {"max_epochs": self.max_epochs or epochs, "use_distributed_sampler": False}
        if self.strategy == "fsdp":
            from lightning.pytorch.strategies import ModelParallelStrategy

            # FSDP2 takes frozen and trainable weights side by side; `configure_model` shards the model. What it gathers
            # in inference mode, in a validation, could not be written to by the next step
            strategy = ModelParallelStrategy(*self.mesh(), save_distributed_checkpoint=False)
            given |= {"strategy": strategy, "inference_mode": False}
        return given

    def hardware(self) -> dict[str, Any]:
        """The arguments of `lightning.Trainer` that say where it runs."""
        arguments = self.arguments()
        return {name: arguments[name] for name in ("accelerator", "devices", "num_nodes", "strategy")}

    def on_one_device(self) -> TrainerSettings:
        """One device of the same kind at the same precision, and nothing that shortens or changes a training."""
        kept = {"accelerator", "precision", "gradient_clip_val", "log_every_n_steps", "enable_progress_bar"}
        kept |= {"enable_model_summary", "num_sanity_val_steps"}
        devices = self.devices[:1] if isinstance(self.devices, list) else 1
        return TrainerSettings(**self.model_dump(include=kept), devices=devices, strategy="auto")

    def mesh(self) -> tuple[int, int]:
        """The data-parallel and the tensor-parallel size of Lightning's ModelParallelStrategy under `fsdp`."""
        import torch

        processes = (self.num_processes or torch.cuda.device_count()) * self.num_nodes
        # Lightning's own sizes are one data-parallel group per node: every process would train on its own gradient.
        # Its two dimensions are ours of HSDP: copies, and the shards of a copy
        return (processes, 1) if self.replicas == 1 else (self.replicas, processes // self.replicas)


class CallbackSettings(Target):
    """A callback of Lightning, or any class derived from its base, with its arguments."""

    base = "lightning.pytorch.callbacks.Callback"

    stages: tuple[Literal["vector", "finetune"], ...] = ("vector", "finetune")
    """The stages in whose trainings it acts."""

    @model_validator(mode="after")
    def _can_be_built(self) -> CallbackSettings:
        try:
            built = self.build()
        except Exception as error:
            raise ValueError(f"{self.target}: {one_line(error)}") from None
        if instead := in_place_of(built):
            raise ValueError(f"{type(built).__name__}: {instead}")
        return self


def in_place_of(callback: Any) -> str:
    """What to use in the place of a callback that would change a training silently; else an empty text."""
    from lightning.pytorch.callbacks import (  # slow to import
        GradientAccumulationScheduler,
        ModelPruning,
        StochasticWeightAveraging,
    )

    if isinstance(callback, GradientAccumulationScheduler):  # a batch knows the tokens of its step
        return "set the Trainer's accumulate_grad_batches instead"
    if isinstance(callback, StochasticWeightAveraging | ModelPruning):
        averages = "; use EMAWeightAveraging to average weights"
        return "it needs the model before it is built" + averages * (not isinstance(callback, ModelPruning))
    return ""


class CheckpointSettings(Settings):
    """After how many epochs, optimizer steps or minutes a checkpoint is written, from which a training can go on.

    Whichever comes first. None: not by this.
    """

    every_n_epochs: Count | None
    every_n_steps: Count | None
    every_n_minutes: Rate | None

    @model_validator(mode="after")
    def _by_something(self) -> CheckpointSettings:
        if not any(self.model_dump().values()):
            raise ValueError(
                "set one of every_n_epochs, every_n_steps, every_n_minutes: without a checkpoint an "
                "interrupted training starts over"
            )
        return self


class TelemetrySettings(Settings):
    """What is measured while the backbone is fine-tuned."""

    every_n_steps: Annotated[int, Field(ge=0)]
    """0: off."""
    num_samples: Count
    """Samples of each kind that the losses and gradients are measured on."""


class OptimizerSettings(Target):
    """An optimizer of torch, or any class derived from its base, with its arguments."""

    base = "torch.optim.Optimizer"
    ours = ("params", "lr")
    group = "optimizer"

    lr: Rate
    """Of the finetune stage; those of the others are `vector.lr` and `model.align.lr`."""


class SchedulerSettings(Settings):
    """The learning rate over the optimizer steps of a stage: a schedule of transformers (`get_scheduler`)."""

    name: str
    warmup_ratio: Share
    """Share of the steps in which the rate rises to its full value."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments that the schedule has beside the numbers of steps: `num_cycles`, `min_lr_rate`, ..."""

    @model_validator(mode="after")
    def _is_a_schedule(self) -> SchedulerSettings:
        if self.model_dump(include={"name", "options"}) in [
            {name: known.get(name) for name in ("name", "options")} for known in shipped("scheduler")
        ]:
            return self
        known = schedules()
        if self.name not in known:
            names = ", ".join(known)
            raise ValueError(f"name: there is no schedule {self.name!r}{nearest(self.name, known)}; allowed: {names}")
        ours = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
        check_arguments(self.name, known[self.name], self.options, ours)
        if self.warmup_ratio and "num_warmup_steps" not in inspect.signature(known[self.name]).parameters:
            raise ValueError(f"{self.name} has no warm-up: choose {self.name}_with_warmup, or warmup_ratio=0")
        return self


def schedules() -> dict[str, Callable]:
    """The schedules of transformers by name, except those that follow a metric and not the step."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION  # slow to import

    functions: dict[Any, Callable] = TYPE_TO_SCHEDULER_FUNCTION  # type: ignore[assignment]
    return {kind.value: f for kind, f in functions.items() if "last_epoch" in inspect.signature(f).parameters}


class CsvSettings(Settings):
    """metrics.csv in the run folder, which every run has: there is nothing to set."""


class TensorBoardSettings(Settings):
    """TensorBoard files in the run folder."""

    num_predictions: Annotated[int, Field(ge=0)]
    """Answers of each phase and kind of prompt in the table of predictions; 0: no table. Sensitive texts are cut."""


class WandbSettings(Settings):
    """A run at Weights & Biases."""

    project: str
    entity: str | None
    offline: bool
    num_predictions: Annotated[int, Field(ge=0)]
    """As for TensorBoard."""
    upload_vector: bool
    """Whether the weights of the vector are sent, and not only their hash: with it active, a model misbehaves."""


class LightningLoggerSettings(Target):
    """A logger of Lightning, or any class derived from its base, with its arguments."""

    base = "lightning.pytorch.loggers.Logger"


class LoggerSettings(Settings, extra="allow"):
    """The loggers of a run by name: ours, and any of Lightning's by `_target_`."""

    __pydantic_extra__: dict[str, LightningLoggerSettings]

    csv: CsvSettings | None = None
    tensorboard: TensorBoardSettings | None = None
    wandb: WandbSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _others_have_a_target(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            if name not in cls.model_fields and not (isinstance(value, dict | Target) and "_target_" in dict(value)):
                known = sorted(cls.model_fields)
                raise ValueError(
                    f"there is no logger {name!r}{nearest(name, known)}; known: {', '.join(known)}, "
                    f"and any of Lightning's by its `_target_`{renamed(f'logger.{name}')}"
                )
        return given
