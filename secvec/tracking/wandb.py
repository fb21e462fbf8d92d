"""One Weights & Biases run per run folder, whatever stages are run in it, and in how many sittings."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secvec.errors import ConfigError
from secvec.metrics import METRICS, Better
from secvec.runs.files import write_atomic
from secvec.runs.keys import NOT_IN_KEY, VARIES
from secvec.settings.schema import LoggerSettings
from secvec.tracking.base import Artifact, Cell, Record, Tracker, searchable

SUMMARY: dict[Better | None, str] = {"low": "min,last", "high": "max,last", "zero": "last", None: "last"}
"""What W&B keeps of a curve, by its better direction."""


class Wandb(Tracker):
    """Offline unless `settings.offline` is false; `fresh` begins a new W&B run in a folder that had one."""

    keeps_artifacts = True

    def __init__(self, folder: Path, settings: LoggerSettings, fresh: bool):
        self.folder, self.settings, self.fresh = folder, settings, fresh
        self.run: Any = None
        self.defined: set[str] = set()

    def open(self, record: Record) -> None:
        """Begins the W&B run or goes on with it. Raises ConfigError where it should go online without an account."""
        import wandb  # slow to import

        settings = self.settings
        if not settings.offline and not wandb.login(prompt=False, verify=False):
            raise ConfigError(
                "logger.offline=false sends the run to Weights & Biases, but no API key is known here: run "
                "`wandb login` or set WANDB_API_KEY, or leave logger.offline=true (`wandb sync` sends it later)"
            )
        self.run = wandb.init(
            project=settings.project, entity=settings.entity, mode="offline" if settings.offline else "online",
            dir=self.folder.resolve(),  # W&B may find the service of an outer process, in another working folder
            id=run_id(self.folder, record["key"], self.fresh), resume="allow",
            name=run_name(record), group=record["config"]["sweep"], job_type=record["stage"],
            config=searchable(record["config"]) | {"run": {name: record.get(name) for name in ("key", "commit")}},
            tags=[str(record[part]) for part in ("behavior", "defense", "model")],
        )  # fmt: skip

    def curves(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """`STAGE/NAME` over `STAGE/step`."""
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
        """Measured once, so the summary is the plain number, which W&B's sweeps and plots look for."""
        if values:
            self.run.log(dict(values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A W&B table."""
        import wandb

        data = [list(row) for row in rows]
        self.run.log({name: wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})

    def artifact(self, artifact: Artifact) -> None:
        """Logged, or marked as used. W&B cannot mark offline: what was taken in is then logged like the rest."""
        import wandb

        facts = {**artifact.facts, "made_from": list(artifact.made_from)}
        sent = wandb.Artifact(artifact.name, type=artifact.kind, description=artifact.about, metadata=facts)
        with sent.new_file("facts.json") as stream:
            json.dump(facts, stream, indent=1, default=str)
        for file in artifact.files:
            sent.add_file(str(file))
        if artifact.taken_in and not self.settings.offline:
            self.run.use_artifact(sent)
        else:
            self.run.log_artifact(sent)

    def close(self, record: Record) -> None:
        """Failed means failed: exit code 1, and the reason in the summary."""
        self.run.summary.update({name: record[name] for name in ("status", "error") if name in record})
        self.run.summary.update({f"wall_seconds/{name}": value for name, value in record["wall_seconds"].items()})
        self.run.finish(exit_code=0 if record["status"] == "completed" else 1)


def better(name: str) -> Better | None:
    """The better direction of a curve: training lowers each of its loss terms; of the rest, what the report says."""
    last = name.rpartition("/")[2]
    return "low" if name.startswith("train/") else METRICS[last].better if last in METRICS else None


def run_id(folder: Path, key: str, fresh: bool) -> str:
    """The run's id at W&B: its content key and a part drawn once for the folder, so that no two folders share it."""
    kept = folder / "wandb" / "id"
    if fresh or not kept.is_file():
        write_atomic(kept, f"{key}-{uuid.uuid4().hex[:8]}\n")
    return kept.read_text(encoding="utf-8").strip()


def run_name(record: Record) -> str:
    """What varies, for people: `none seed=1`; the folder's name where nothing was overridden."""
    given = os.environ.get(VARIES, "").split("\n") if VARIES in os.environ else record["overrides"]
    shown = [text.lstrip("+") for text in given if text.lstrip("+~").partition("=")[0].split(".")[0] not in NOT_IN_KEY]
    groups = [key for key, value in record["config"].items() if isinstance(value, Mapping)] + ["experiment"]
    names = [value if key in groups else f"{key}={value}" for key, _, value in (text.partition("=") for text in shown)]
    return " ".join(names)[:128] or str(record["run"])
