"""A forked job is what its command would be: arguments, environment, console, exit code, session, lock."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from secvec.multirun.forked import Forked

SCRIPT = """
import atexit, os, sys, time
atexit.register(print, "ended as a command ends")
print(__name__, sys.argv[1:], sys.path[0] == os.path.dirname(__file__), os.environ.get("MINE"), "HOME" in os.environ)
print(os.getsid(0) == os.getpid(), "torch" in sys.modules, flush=True)
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[1]))
"""


def start(folder: Path, *arguments: str) -> Forked:
    script, console = folder / "script.py", folder / "console.log"
    script.write_text(SCRIPT)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, str(script), *arguments]
        return Forked(command, {"MINE": "1", "PATH": os.environ["PATH"]}, console, lock.fileno(), [])


def wait(process: Forked) -> int:
    end = time.monotonic() + 60
    while (code := process.poll()) is None and time.monotonic() < end:
        time.sleep(0.01)
    assert code is not None
    return code


def test_it_runs_and_ends_as_its_command_would(tmp_path: Path) -> None:
    assert wait(start(tmp_path, "3", "0")) == 3
    console = (tmp_path / "console.log").read_text()
    assert console == "__main__ ['3', '0'] True 1 False\nTrue True\nended as a command ends\n"


def test_it_holds_the_lock_until_it_ends_and_has_a_group_of_its_own(tmp_path: Path) -> None:
    process = start(tmp_path, "0", "60")
    with (tmp_path / "lock").open("w") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.killpg(process.pid, signal.SIGKILL)
        assert wait(process) == -signal.SIGKILL == process.poll()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
