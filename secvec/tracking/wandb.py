"""Weights & Biases: one W&B run for each run folder, also when its stages are run one by one."""

import json
import os
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secvec.errors import ConfigError, nearest
from secvec.metrics import Better, metric_of
from secvec.runs.files import write_atomic
from secvec.runs.keys import NOT_IN_KEY, VARIES
from secvec.runs.record import Record
from secvec.settings.trainer import WandbSettings
from secvec.tracking.base import Artifact, Cell, Tracker, searchable

SUMMARY: dict[Better | None, str] = {"low": "min,last", "high": "max,last", "zero": "last", None: "last"}
"""The summary that W&B keeps of a curve, by its better direction."""


MODES = ("online", "offline", "disabled")
PROJECT = "secvec"
"""The default of `logger.wandb.project` in conf/."""
CONNECT_SECONDS = 10
NO_LOSSES = ("learning_rate", "gradient_norm", "tokens_per_second", "epoch")
"""Curves of a training that are neither better high nor low."""


class Wandb(Tracker):
    """Writes a W&B run; `fresh` begins a new one in a folder that has one."""

    keeps_artifacts = True

    def __init__(self, folder: Path, settings: WandbSettings, fresh: bool):
        self.folder, self.settings, self.fresh = folder, settings, fresh
        self.num_predictions = settings.num_predictions
        self.run: Any = None
        self.defined: set[str] = set()

    def open(self, record: Record) -> None:
        """Begins or resumes the W&B run. Raises ConfigError for `offline=false` without an account or a network."""
        import wandb  # slow to import

        project, entity, mode = self.account()
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ConfigError(
                "logger.wandb.offline=false sends the run to Weights & Biases, but no API key is known here: run "
                "`wandb login` or set WANDB_API_KEY, or leave logger.wandb.offline=true (`wandb sync` sends it later)"
            )
        if mode == "online":
            check_network(wandb.setup().settings.base_url)
        self.run = wandb.init(
            project=project,
            entity=entity,
            mode=mode,  # type: ignore[arg-type]
            dir=self.folder.resolve(),  # W&B may find the service of an outer process, in another working folder
            id=None if mode == "disabled" else run_id(self.folder, record.key, self.fresh),
            resume="allow",
            name=run_name(record),
            group=record.config.get("sweep"),
            job_type=record.stage,
            config=searchable(record.config) | {"run": {"key": record.key, "commit": record.commit}},
            tags=[tag[:64] for tag in (record.behavior, record.defense, record.model)],  # W&B takes no longer ones
        )

    def account(self) -> tuple[str, str | None, str]:
        """Project, entity and mode. W&B's own variables count where a setting has its default. Raises ConfigError."""
        settings, given = self.settings, os.environ
        mode = given.get("WANDB_MODE", "offline") if settings.offline else "online"
        if mode not in MODES:
            raise ConfigError(f"WANDB_MODE={mode}{nearest(mode, MODES)}: it is one of {', '.join(MODES)}")
        project = given.get("WANDB_PROJECT") if settings.project == PROJECT else None
        return project or settings.project, settings.entity or given.get("WANDB_ENTITY"), mode

    def curves(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Logs `STAGE/NAME` over `STAGE/step`."""
        axis = f"{stage}/step"
        if axis not in self.defined:
            self.run.define_metric(axis, hidden=True)
            self.defined.add(axis)
        for name in values:
            if f"{stage}/{name}" not in self.defined:
                self.run.define_metric(f"{stage}/{name}", step_metric=axis, summary=SUMMARY[better(name)])
                self.defined.add(f"{stage}/{name}")
        self.run.log({axis: step} | {f"{stage}/{name}": value for name, value in values.items()})

    def outcomes(self, values: Mapping[str, float]) -> None:
        """Logs each under its plain name, where W&B's sweeps and plots find it."""
        if values:
            self.run.log(dict(values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Logs a W&B table."""
        import wandb

        data = [list(row) for row in rows]
        self.run.log({name: wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})

    def artifact(self, artifact: Artifact) -> None:
        """Logs it, or marks it as used; offline W&B cannot mark, so it is logged then too."""
        import wandb

        facts = {**artifact.facts, "made_from": list(artifact.made_from)}
        sent = wandb.Artifact(artifact.name, type=artifact.kind, description=artifact.about, metadata=facts)
        with sent.new_file("facts.json") as stream:
            json.dump(facts, stream, indent=1, default=str)
        for file in artifact.files:
            sent.add_file(str(file))
        if artifact.used and self.account()[2] == "online":
            self.run.use_artifact(sent)
        else:
            self.run.log_artifact(sent)

    def close(self, record: Record) -> None:
        """Ends the W&B run; a failed one has exit code 1, and the error in its summary."""
        self.run.summary.update({"status": record.status, **({"error": record.error} if record.error else {})})
        self.run.summary.update({f"wall_seconds/{name}": value for name, value in record.wall_seconds.items()})
        self.run.finish(exit_code=0 if record.status == "completed" else 1)


def check_network(url: str) -> None:
    """Raises ConfigError where W&B cannot be reached; its own client tries for minutes."""
    try:
        urllib.request.urlopen(url, timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answers
    except OSError as error:
        raise ConfigError(
            f"Weights & Biases cannot be reached at {url} ({error}): set logger.wandb.offline=true, and send the run "
            "later with `wandb sync`"
        ) from None


def better(name: str) -> Better | None:
    """The better direction of a curve: low for a loss, else as in the report; None where there is none."""
    last = name.rpartition("/")[2]
    if name.startswith(("train/", "val/")):
        return None if last in NO_LOSSES else "low"
    metric = metric_of(name)
    return metric.better if metric else None


def run_id(folder: Path, key: str, fresh: bool) -> str:
    """The id of the W&B run: the content key and a random part, kept in the folder. No two folders share one."""
    kept = folder / "wandb" / "id"
    if fresh or not kept.is_file():
        write_atomic(kept, f"{key}-{uuid.uuid4().hex[:8]}\n")
    return kept.read_text(encoding="utf-8").strip()


def run_name(record: Record) -> str:
    """The overrides that vary, as in `none seed=1`; without any, the name of the folder."""
    given = os.environ.get(VARIES, "").split("\n") if VARIES in os.environ else record.overrides
    shown = [text.lstrip("+") for text in given if text.lstrip("+~").partition("=")[0].split(".")[0] not in NOT_IN_KEY]
    groups = [key for key, value in record.config.items() if isinstance(value, Mapping)] + ["experiment"]
    names = [value if key in groups else f"{key}={value}" for key, _, value in (text.partition("=") for text in shown)]
    return " ".join(names)[:128] or record.run
