"""Jobs forked from a process that has imported all that they need: seconds less for each of them."""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, get_context
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["secvec.multirun.forked", "secvec.cli", "secvec.run"])


class Forked:
    """A process that runs `python SCRIPT ARGUMENTS`, with what is used of `subprocess.Popen`.

    The first one starts the server that all are forked from, with the environment of that moment: variables that are
    read by a library as it is loaded (OMP_NUM_THREADS) must be those of the job. The process has a session of its own,
    holds the open file `lock`, and ignores the signals in `ignored`.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], console: Path, lock: int, ignored: Sequence[int]
    ):
        before = dict(os.environ)
        os.environ |= environment
        try:
            forkserver.ensure_running()  # a second call starts none
        finally:
            os.environ.clear()
            os.environ |= before
        given = (list(command), dict(environment), str(console), _Inherited(lock), list(ignored))
        self.process = CONTEXT.Process(target=_run, args=given)
        self.process.start()
        self.pid: int = self.process.pid  # type: ignore[assignment]  # it is started
        while self.poll() is None and not self._leads_its_group():  # before that a signal to its group finds nobody
            time.sleep(0.005)

    def poll(self) -> int | None:
        """The exit code, the negative number of the signal that killed it, or None while it runs."""
        return self.process.exitcode

    def _leads_its_group(self) -> bool:
        try:
            return os.getpgid(self.pid) == self.pid
        except ProcessLookupError:
            return True


class _Inherited:
    """An open file that the process gets too, and keeps open until it ends."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inherited._opened, (DupFd(self.number),)

    @staticmethod
    def _opened(duplicate: Any) -> _Inherited:
        return _Inherited(duplicate.detach())


def _run(command: list[str], environment: dict[str, str], console: str, _: _Inherited, ignored: list[int]) -> None:
    """The process: as if it had been started by its command."""
    out = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.environ.clear()
    os.environ |= environment
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    script = command[1]
    sys.argv, sys.path[0] = command[1:], str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without them
