"""What the benchmarks share: a command and what it took, the machine it ran on, medians with their spread."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "results" / "performance", ROOT / "docs" / "performance.md"
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
PACKAGES = ("torch", "transformers", "trl", "peft", "lightning", "lm_eval", "vllm")
MEASURED = "measured: "
"""How a process that measures itself begins the line of its result, which is JSON."""


@dataclass(frozen=True)
class Ran:
    """A command that has ended well."""

    seconds: float
    """Wall time from its start to its end."""
    peak_bytes: int
    """Its largest resident memory."""
    out: str

    @property
    def measured(self) -> dict[str, Any]:
        """The result that the process itself has printed."""
        return result(self.out)


def keep_report(sweeps: Sequence[str], name: str, folder: Path) -> None:
    """Makes one report of the sweeps in outputs/NAME, and copies what is kept of it into `folder`."""
    made = ROOT / "outputs" / name
    folders = [ROOT / "outputs" / sweep for sweep in sweeps]
    subprocess.run([sys.executable, "-m", "secvec.report", *folders, "--to", made], cwd=ROOT, check=True)
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("report.json", "report.md"):
        shutil.copy(made / file, folder)


def result(out: str) -> dict[str, Any]:
    """The result that a process has printed. Raises StopIteration where there is none."""
    line = next(line for line in out.splitlines() if line.startswith(MEASURED))
    found: dict[str, Any] = json.loads(line.removeprefix(MEASURED))
    return found


def start(command: Sequence[str | Path], own_group: bool = False) -> subprocess.Popen[bytes]:
    """Starts a command with this Python and this copy of the package; what it prints goes into one pipe.

    With a group of its own it can be killed together with all that it starts.
    """
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    given = [sys.executable, *map(str, command)]
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(given, cwd=ROOT, env=environment, stdout=pipe, stderr=both, start_new_session=own_group)


def run(command: Sequence[str | Path]) -> Ran:
    """Runs a command to its end. Exits with its last lines if it fails."""
    began, process = time.perf_counter(), start(command)
    assert process.stdout is not None
    out = process.stdout.read().decode("utf-8", "replace")
    _, status, usage = os.wait4(process.pid, 0)  # as `wait`, and the memory of this process alone
    seconds, process.returncode = time.perf_counter() - began, os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with code {process.returncode}:\n{out[-2000:]}")
    return Ran(seconds, usage.ru_maxrss * 1024, out)


def small_model(folder: Path) -> Path:
    """The folder of SmolLM2 where `make smollm2` has put it, else of the tiny model, made in `folder`."""
    if SMOLLM2.is_dir():
        return SMOLLM2
    from secvec.data.embedded import Ordinary
    from secvec.models.tiny import build_tiny

    texts = [text for row in Ordinary().examples("align", 100, 0) for text in (row.prompt, row.response)]
    for part in build_tiny(texts, 0):
        part.save_pretrained(folder)
    return folder


def machine() -> dict[str, Any]:
    """Where and with what it ran. `load`: processes that were running in the last minute, our own among them."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": os.getloadavg()[0],
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": commit.stdout.strip(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The median, with the lowest and the highest."""
    low, high, middle = (f"{value:.{digits}f}" for value in (min(values), max(values), statistics.median(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def over_seeds(records: Sequence[Mapping[str, Any]], name: str) -> str:
    """The mean of a metric over those records that have it, with the lowest and the highest where they differ."""
    values = [record["metrics"][name]["value"] for record in records if name in record["metrics"]]
    if not values:
        return "–"
    mean, low, high = (f"{value:.3f}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def finished(script: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """The record of a run in `folder`, relative to the repository, made unless it is there and finished."""
    record = ROOT / folder / "record.json"
    if not record.is_file() or json.loads(record.read_text())["status"] != "completed":
        subprocess.run([sys.executable, script, *overrides, f"run_dir={folder}"], cwd=ROOT, check=True)
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def footer(how: str, about: Mapping[str, Any]) -> str:
    """The line below a table: `how` it was measured, where, and with which versions."""
    where = [f"{about['cores']} cores ({about['cpu']})", *(f"{k} {v}" for k, v in about["versions"].items())]
    return f"{how}; {', '.join(where)}; commit {about['commit'][:7]}."
