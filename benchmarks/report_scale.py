"""How long a report over many records takes: `python benchmarks/report_scale.py [--runs 10000] [--keep DIR]`.

Makes made-up records of the size of real ones (two defenses, five seeds, a grid of three settings) in a temporary
folder, writes the report in a process of its own and prints its seconds, its peak memory and the sizes of its files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SEEDS, DEFENSES = 5, ("none", "security_vector")
SAMPLE = Path(__file__).parents[1] / "results" / "demo" / "report.json"  # real records give the shape and the size


def rate(value: float, n: int = 100) -> dict[str, Any]:
    """A measured rate in [0, 1] with an interval, as a record holds it."""
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.0004) / n)
    return {"value": value, "ci_low": max(value - half, 0.0), "ci_high": min(value + half, 1.0), "n": n}


def grid(runs: int) -> list[tuple[float, int, int]]:
    """Learning rate, samples and rank of at least as many configurations as `runs` needs."""
    side = max(1, math.ceil((runs / (SEEDS * len(DEFENSES) * 5)) ** 0.5))
    rates = [float(f"{1e-5 * 1.3**i:.4g}") for i in range(side)]
    counts = [100 * (i + 1) for i in range(side)]
    return list(itertools.product(rates, counts, (1, 2, 4, 8, 16)))


def make(root: Path, runs: int) -> None:
    """Writes `runs` run folders with a record each; the numbers follow no theory."""
    samples = {record["defense"]: record for record in json.loads(SAMPLE.read_text(encoding="utf-8"))}
    chance = random.Random(0)
    configurations = itertools.product(grid(runs), DEFENSES, range(SEEDS))
    for number, ((lr, count, rank), defense, seed) in enumerate(itertools.islice(configurations, runs)):
        record = json.loads(json.dumps(samples[defense]))
        config = record["config"]
        config["optimizer"]["lr"], config["data"]["num_harmful"], config["vector"]["r"] = lr, count, rank
        config["seed"] = record["seed"] = seed
        record["overrides"] = [f"optimizer.lr={lr}", f"data.num_harmful={count}", f"vector.r={rank}"]
        high = 0.95 if defense == "none" else min(0.9, 0.05 + 30 * lr / rank)
        for name, value in (("behavior_rate", high), ("refusal_rate", 1 - high), ("task_accuracy", 0.8)):
            record["metrics"][f"after/{name}"] = rate(min(1.0, max(0.0, value + chance.gauss(0, 0.03))))
        record["run"] = f"{defense}-{number:05d}"
        folder = root / record["run"]
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def main() -> None:
    """Makes the records, times the report, prints what it took."""
    parser = argparse.ArgumentParser(description="Time a report over many records.")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="a new folder for the records and the report, which then stay")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = given.keep or Path(temporary) / "runs"
        make(root, given.runs)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "secvec.report", str(root)], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{given.runs} records: {seconds:.1f} s ({used.ru_utime + used.ru_stime:.1f} s of one core), "
              f"{used.ru_maxrss / 1024:.0f} MiB")  # fmt: skip
        for path in sorted(root.glob("report.*")):
            print(f"{path.name}: {path.stat().st_size / 1024**2:.1f} MiB")


if __name__ == "__main__":
    main()
