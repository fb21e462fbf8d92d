"""A sweep of 12 jobs beside 12 separate runs: `python benchmarks/sweep.py [--rounds 2]`.

The whole method on the tiny model in some seconds of computing for each job: three learning rates, two defenses, two
seeds. `sweep`: one `train.py -m` with one worker. `shared`: 12 calls of `train.py` one after another that find what
another has made, as those of a sweep do. `alone`: the same, each with a cache of its own. A job that computes longer
gains less: what one job saves in seconds is shown too. The record goes into results/performance/, its table into
docs/performance.md; `--table` makes the table again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_check import SMALL
from measure import PAGE, RESULTS, footer, machine, run, spread
from pages import keep, show

RECORDS = RESULTS / "sweep.json"
TITLE = "A sweep beside separate runs"
WAYS = {
    "sweep": "`train.py -m`, one worker",
    "shared": "12 runs, one cache",
    "alone": "12 runs, each with its own cache",
}
SWEPT = {"optimizer.lr": ("5e-4", "7e-4", "1e-3"), "defense": ("none", "security_vector"), "seed": ("0", "1")}
JOBS = [
    [f"{key}={one}" for key, one in zip(SWEPT, values, strict=True)] for values in itertools.product(*SWEPT.values())
]
LONGER = (60, 600)
"""Seconds of computing for which the ratio is computed too."""


def measure(way: str, folder: Path) -> dict[str, Any]:
    """Seconds of all jobs in one way, and their metrics after the fine-tune, which must be the same in every way."""
    seconds = 0.0
    if way == "sweep":
        swept = [f"{key}={','.join(values)}" for key, values in SWEPT.items()]
        where = [f"hydra.sweep.dir={folder / 'jobs'}", f"paths.cache={folder / 'cache'}"]
        seconds = run(["train.py", "-m", *SMALL, *swept, *where, "hydra.launcher.n_jobs=1"]).seconds
    else:
        for number, job in enumerate(JOBS):
            cache = folder / ("cache" if way == "shared" else f"cache-{number}")
            where = [f"run_dir={folder / 'jobs' / str(number)}", f"paths.cache={cache}"]
            seconds += run(["train.py", *SMALL, *job, *where]).seconds
    records = [json.loads(file.read_text(encoding="utf-8")) for file in (folder / "jobs").glob("*/record.json")]
    metrics = {
        record["key"]: {
            name: one["value"] for name, one in sorted(record["metrics"].items()) if name.startswith("after/")
        }
        for record in records
    }
    return {"way": way, "seconds": seconds, "metrics": dict(sorted(metrics.items()))}


def table(record: Mapping[str, Any]) -> str:
    """Medians over the rounds, with the lowest and the highest."""
    runs, n = record["runs"], len(JOBS)
    taken = {way: [one["seconds"] for one in runs if one["way"] == way] for way in WAYS}
    base = statistics.median(taken["sweep"])
    head = ["", "seconds for 12 jobs ↓", "of the sweep's (aim 2.5)", "saved per job (s)"]
    head += [f"with {longer} s more in each job" for longer in LONGER] + ["same results"]
    lines = [f"|{' |'.join(f' {name}'.rstrip() for name in head)} |", "| --- " * len(head) + "|"]
    for way, name in WAYS.items():
        middle = statistics.median(taken[way])
        ratios = [(middle + n * longer) / (base + n * longer) for longer in LONGER]
        same = all(one["metrics"] == runs[0]["metrics"] for one in runs if one["way"] == way)
        cells = [name, spread(taken[way], 0), f"{middle / base:.2f}", f"{(middle - base) / n:.1f}"]
        lines.append(f"| {' | '.join([*cells, *(f'{ratio:.2f}' for ratio in ratios), 'yes' if same else 'no'])} |")
    return "\n".join([*lines, "", footer(f"{record['rounds']} rounds, tiny model, one thread", record["machine"])])


def main() -> None:
    """Runs the jobs in all ways and writes the record and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        about, runs = machine(), []
        for number in range(given.rounds):
            for way in WAYS:
                with tempfile.TemporaryDirectory() as folder:
                    runs.append(measure(way, Path(folder)))
                print(f"round {number + 1}: {way} {runs[-1]['seconds']:.1f} s", flush=True)
        keep({"rounds": given.rounds, "machine": about, "runs": runs}, RECORDS)
    show(table(json.loads(RECORDS.read_text(encoding="utf-8"))), __file__, PAGE, TITLE)


if __name__ == "__main__":
    main()
