"""One job of a multirun: a process of its own, in a folder of its own, whose record says how it ended."""

from __future__ import annotations

import fcntl
import json
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
from secvec.runs.files import write_atomic

STOP_SECONDS = 20.0
"""That a job has to write down its end after Ctrl-C, before it is killed."""
OTHERS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE")
"""Variables of a process group around the multirun, as those of SLURM: a job makes a group of its own."""


@dataclass(eq=False)
class Job:
    """What it runs, where, and how it ended."""

    overrides: list[str]
    config: dict[str, Any]
    """As composed, not validated."""
    content: str
    """Key of all that shapes its results."""
    folder: Path
    command: list[str]
    label: str = ""
    """The overrides in which it differs from the other jobs."""
    environment: dict[str, str] = field(default_factory=dict)
    code: int | None = None
    """Exit code; negative: the signal that killed it; None: not ended."""
    reason: str = ""
    """Why it ended, where the executor knows more than the console shows."""
    began: float = 0.0
    """When its process was started here, seconds since the epoch; a record from before is not its own."""
    unsaid: bool = False
    """Whether it ended without saying how: its record is ours, and no tracker knows."""
    busy: bool = False
    """Whether a process of another multirun was found to work in its folder."""

    @property
    def console(self) -> Path:
        """What it prints."""
        return self.folder / "console.log"

    @property
    def trainer(self) -> dict[str, Any]:
        """Its trainer settings, not validated."""
        given = self.config.get("trainer")
        return given if isinstance(given, dict) else {}

    def finished(self) -> bool:
        """Whether its folder holds exactly this run, and all of the stages it wants. Costs no process of its own."""
        if self.config.get("force") or self.config.get("plan") or "stage" not in self.config:
            return False
        record, wanted = read_record(self.folder), self.config["stage"]
        same = record.get("content") == self.content
        last = "infer" if wanted == "all" else wanted
        return same and record.get("status") == "completed" and last in record.get("stages", [])

    def start(self, ignored: Sequence[signal.Signals] = ()) -> subprocess.Popen[bytes] | None:
        """Its process; None while another one, perhaps of a multirun that was killed, still works in its folder.

        None with code 0 when that one has ended and left nothing to do. The lock is held by the
        process itself: the kernel frees it however that process ends. Signals in `ignored` do not reach it.
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
            around = {k: v for k, v in os.environ.items() if k not in OTHERS and not k.startswith("SLURM_")}
            with self.console.open("wb") as out:
                return subprocess.Popen(
                    self.command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    start_new_session=True, env=around | self.environment, pass_fds=[lock.fileno()],
                    preexec_fn=choose_signals,
                )  # fmt: skip

    def last_line(self) -> str:
        """What it says now: the last line, or state of a progress bar."""
        if not self.console.is_file():
            return "starting"
        with self.console.open("rb") as stream:
            stream.seek(max(0, self.console.stat().st_size - 2000))
            text = stream.read().decode("utf-8", "replace").replace("\x1b[A", "")
        parts = [part.strip() for part in text.replace("\r", "\n").split("\n") if part.strip()]
        return parts[-1][:110] if parts else "starting"

    def error(self) -> str:
        """The message it ended with."""
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
        """A job that could not write its own record (killed, out of memory, a wrong setting) still has one."""
        path, record = self.folder / "record.json", read_record(self.folder)
        said = record.get("status") == "failed" and path.stat().st_mtime >= self.began
        if self.code == 0 or (said and not self.reason):
            return
        self.unsaid = True
        known = {name: self.config.get(name) for name in ("stage", "seed")}
        known |= {name: (self.config.get(name) or {}).get("name") for name in ("defense", "behavior", "model")}
        known |= {"overrides": self.overrides, "content": self.content, "config": self.config, "metrics": {}}
        record = {"schema": 1, "run": self.folder.name, **known, **record}
        record |= {"status": "failed", "error": self.error()}
        write_atomic(path, json.dumps(record, indent=1, default=str) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """What the record of a run folder says; empty without a record that can be read."""
    try:
        found = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def this_program() -> str:
    """PYTHONPATH under which `python -m` finds this very program, from whatever folder."""
    paths = [str(Path(secvec.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kills what an ended job has left in its process group: other ranks wait for it for ever, and hold their GPUs."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends processes that still run, with those that they started: first as Ctrl-C does, all at once."""
    for sign, patience in ((signal.SIGINT, STOP_SECONDS), (signal.SIGKILL, 5.0)):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, sign)
        limit = time.monotonic() + patience
        while any(process.poll() is None for process in processes) and time.monotonic() < limit:
            time.sleep(0.05)
    for process in processes:
        end_group(process)
