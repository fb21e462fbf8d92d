"""One job of a multirun: its own process and folder, with a record that says how it ended."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import secvec
from secvec.errors import ConfigError
from secvec.multirun.forked import Forked
from secvec.runs.record import FILE, Record, record_failure

STOP_SECONDS = 20.0
"""Time that a job has after Ctrl-C to write its record, before it is killed."""
GROUP_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE")
"""Variables of a process group around the multirun. A job does not get them, nor SLURM's: it makes its own group."""
Process = subprocess.Popen[bytes] | Forked


@dataclass(eq=False)
class Job:
    """What a job runs, where, and how it ended."""

    overrides: list[str]
    config: dict[str, Any]
    """The composed config, not validated."""
    key: str
    """The key of its run (`secvec.runs.keys`)."""
    folder: Path
    command: list[str]
    label: str = ""
    """The overrides that other jobs do not share."""
    environment: dict[str, str] = field(default_factory=dict)
    code: int | None = None
    """Exit code; negative: the signal that killed the job; None: not ended."""
    reason: str = ""
    """Why the job ended, where the executor knows more than the console shows."""
    began: float = 0.0
    """Start of its process, seconds since the epoch. An older record is of an earlier try."""
    wrote_no_record: bool = False
    """Whether the job failed without a record of its own: we wrote it, and no tracker knows of the failure."""
    busy: bool = False
    """Whether a process of another multirun was last seen at work in the folder."""

    @property
    def console(self) -> Path:
        """The file that holds what the job prints."""
        return self.folder / "console.log"

    @property
    def trainer(self) -> dict[str, Any]:
        """The trainer settings, not validated."""
        given = self.config.get("trainer")
        return given if isinstance(given, dict) else {}

    @property
    def devices(self) -> int:
        """The number of devices on its node; 1 where the trainer settings give no number, as `auto`.

        Raises ConfigError for a list of GPUs.
        """
        given = self.trainer.get("devices", 1)
        if isinstance(given, list):
            raise ConfigError(
                f"trainer.devices={given}: a multirun gives each job its GPUs, so give their number ({len(given)}); "
                "CUDA_VISIBLE_DEVICES says which GPUs the multirun may use"
            )
        return given if isinstance(given, int) and given > 0 else 1

    def finished(self) -> bool:
        """Whether the folder holds this run with all stages that the job wants. Starts no process."""
        if self.config.get("force") or self.config.get("plan") or "stage" not in self.config:
            return False
        record, wanted = Record.find(self.folder), self.config["stage"]
        last = "infer" if wanted == "all" else wanted
        return bool(record and record.key == self.key and record.status == "completed" and last in record.stages)

    def start(self, ignored: Sequence[signal.Signals] = (), forked: bool = False) -> Process | None:
        """Starts the process, which ignores the signals in `ignored`; `forked`: from one that has imported everything.

        Returns None while another process, perhaps of a multirun that was killed, works in the folder; also when that
        process has finished the run: `code` is then 0. The process itself holds the lock of the folder, and the kernel
        frees the lock however the process ends.
        """

        def choose_signals() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's `&` ignores it, and `stop` needs it
            for sign in ignored:
                signal.signal(sign, signal.SIG_IGN)

        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".job").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.busy = True
                return None
            if self.busy and self.finished():
                self.code = 0
                return None
            self.busy, self.began = False, time.time()
            around = {k: v for k, v in os.environ.items() if k not in GROUP_VARIABLES and not k.startswith("SLURM_")}
            if forked:
                return Forked(self.command, around | self.environment, self.console, lock.fileno(), ignored)
            with self.console.open("wb") as out:
                return subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=around | self.environment,
                    start_new_session=True,
                    pass_fds=[lock.fileno()],
                    preexec_fn=choose_signals,
                )

    def last_line(self) -> str:
        """The last line of the console, or the last state of a progress bar."""
        if not self.console.is_file():
            return "starting"
        with self.console.open("rb") as stream:
            stream.seek(max(0, self.console.stat().st_size - 2000))
            text = stream.read().decode("utf-8", "replace").replace("\x1b[A", "")
        parts = [part.strip() for part in text.replace("\r", "\n").split("\n") if part.strip()]
        return parts[-1][:110] if parts else "starting"

    def error(self) -> str:
        """Why the job failed, as a message."""
        if self.reason:
            return self.reason
        if (self.code or 0) < 0:
            hint = "; out of memory?" if self.code == -signal.SIGKILL else ""
            return f"killed by signal {-(self.code or 0)} ({signal.Signals(-(self.code or 0)).name}{hint})"
        text = self.console.read_text(encoding="utf-8", errors="replace") if self.console.is_file() else ""
        _, found, message = text.rpartition("error: ")
        if found:
            return message.strip()
        return "\n".join(text.replace("\r", "\n").strip().splitlines()[-3:]) or f"ended with code {self.code}"

    def mark_failure(self) -> None:
        """Writes the record of a failed job that could not write it (killed, out of memory, a wrong setting).

        One that failed after its run was whole stays completed: only what came after it is missing.
        """
        record = Record.find(self.folder)
        its_own = record is not None and (self.folder / FILE).stat().st_mtime >= self.began
        status = record.status if record and its_own else None
        if self.code == 0 or status == "completed" or (status == "failed" and not self.reason):
            return
        self.wrote_no_record = True
        record_failure(self.folder, self.error(), self._known())

    def _known(self) -> Record:
        """A record of what the config says. The config may be wrong, so only names that are text count."""
        known: dict[str, Any] = {"stage": self.config.get("stage")}
        for group in ("defense", "behavior", "model"):
            settings = self.config.get(group)
            known[group] = settings.get("name") if isinstance(settings, dict) else None
        known = {name: value for name, value in known.items() if isinstance(value, str)}
        known |= {"seed": self.config.get("seed"), "key": self.key, "overrides": self.overrides, "config": self.config}
        return Record.model_validate(known)


def this_program() -> str:
    """PYTHONPATH with which `python -m secvec...` runs this very copy of the package, from any folder."""
    paths = [str(Path(secvec.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)


def end_group(process: Process) -> None:
    """Kills what an ended job left in its process group: the other ranks would wait for ever and hold their GPUs."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def stop(processes: Sequence[Process]) -> None:
    """Ends processes and those that they started, all at the same time: by SIGINT first, then by SIGKILL."""
    for sign, patience in ((signal.SIGINT, STOP_SECONDS), (signal.SIGKILL, 5.0)):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, sign)
        limit = time.monotonic() + patience
        while any(process.poll() is None for process in processes) and time.monotonic() < limit:
            time.sleep(0.05)
    for process in processes:
        end_group(process)
