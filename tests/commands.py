"""The commands as a person types them, but forked from a process that has imported everything: seconds less each."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import forkserver, get_context
from pathlib import Path

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

ROOT = Path(__file__).parent.parent
FORKSERVER = get_context("forkserver")
FORKSERVER.set_forkserver_preload(["commands", "secvec.run"])


def run_command(
    script: str | Path, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT ARGUMENTS` in `cwd`: exit code, stdout and stderr, as `subprocess.run` gives them."""
    return _run([str(ROOT / script), *arguments], cwd, [env or {}])


def run_on_two(script: str | Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same as two processes of one group, with the variables by which Lightning knows that all are started."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return _run([str(ROOT / script), *arguments], cwd, [group | {"LOCAL_RANK": rank} for rank in "01"])


def run_on_two_nodes(script: str | Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same by two `torchrun` of one process each, as on two nodes (docs/cluster.md); nothing is forked."""
    group = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{_free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *group, str(ROOT / script), *arguments]
    command += ["trainer.num_nodes=2", "trainer.devices=1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as out:
        nodes = [subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=out) for _ in range(2)]
        codes = [node.wait(timeout=300) for node in nodes]
        out.seek(0)
        said = out.read()
    return subprocess.CompletedProcess(command, max(codes, key=abs), said, said)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(argv: list[str], cwd: Path, environments: list[Mapping[str, str]]) -> subprocess.CompletedProcess[str]:
    """A process for each of `environments`; they share what they say, and the code is that of one that failed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        forkserver.ensure_running()  # the first call starts it; it finds modules by PYTHONPATH, not by our sys.path
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        around = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        processes = [FORKSERVER.Process(target=_main, args=(argv, cwd, around | own, out, err)) for own in environments]
        for process in processes:
            process.start()
        end = time.monotonic() + 300
        for process in processes:
            process.join(end - time.monotonic())
        if late := [process for process in processes if process.exitcode is None]:
            for process in late:
                process.kill()
            raise TimeoutError(f"{' '.join(argv)}: {err.read_text()}")
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        return subprocess.CompletedProcess(argv, code, out.read_text(), err.read_text())


def _main(argv: list[str], cwd: Path, environment: Mapping[str, str], out: Path, err: Path) -> None:
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # Lightning has read it when it was imported
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    runpy.run_path(argv[0], run_name="__main__")
