"""What a defense adds to a step of the fine-tune: `python benchmarks/finetune_step.py [--rounds 3] [--steps 4]`.

The same eight rows of data, and eight extra rows beside them where a defense reads such, on SmolLM2 where
`make smollm2` has put it, else on the tiny model. The record goes into results/performance/, its table into
docs/performance.md; `--table` makes the table again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

import yaml
from measure import PAGE, RESULTS, ROOT, footer, spread
from trainers import BATCH, OPTIMIZER, Clock, Job, arguments, compare, lightning, new_vector, peak_bytes

RECORDS = RESULTS / "finetune_step.json"
TITLE = "What a defense adds to a step"
WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "security_vector": {},
    "anchored_vector": {},
    "anchored_vector every=2": {"every": 2},
    "anchored_vector every=4": {"every": 4},
    "labelled_vector": {},
    "kl_to_base": {},
    "safegrad": {},
    "lisa": {},
}
"""Defenses, and their settings that are not those of their yaml."""


def measure(job: Job) -> dict[str, Any]:
    """Seconds of the steps, peak memory and losses of one way, in this process."""
    from secvec.data.batch import Encoded
    from secvec.module import SecVecModule
    from secvec.settings.schema import ModelSettings

    text = (ROOT / "conf" / "defense" / f"{job.way.split()[0]}.yaml").read_text(encoding="utf-8")
    defense = {name: value for name, value in yaml.safe_load(text).items() if name != "defaults"} | WAYS[job.way]
    settings = ModelSettings(name="model", name_or_path=str(job.model))
    vector = new_vector(settings) if defense.get("uses_vector", True) else None
    module, clock = SecVecModule("finetune", settings, vector, defense, optimizer=OPTIMIZER), Clock(job.device)
    extra = module.defense.extra_batch_size
    data, beside = (job.rows(n) for n in (BATCH, max(1, extra)))
    rows: list[tuple[Encoded, bool]] = []
    for step in range(job.steps + 1):
        of_data = data[step * BATCH : (step + 1) * BATCH]
        rows += [(Encoded(ids, p, undesired=n % 2 == 0), False) for n, (ids, p) in enumerate(of_data)]
        rows += [(Encoded(ids, p), True) for ids, p in beside[step * extra : (step + 1) * extra]]
    losses = lightning(module, rows, BATCH + extra, job, clock)
    seconds = clock.ends[job.steps] - clock.ends[0]
    return {"way": job.way, "seconds": seconds, "losses": losses, "peak_bytes": peak_bytes(job.device)}


def table(record: Mapping[str, Any]) -> str:
    """Medians over the rounds, with the lowest and the highest."""
    runs, steps = record["runs"], record["steps"]
    lines = ["| | seconds per step ↓ | of the plain step's | peak memory ↓ |", "| --- " * 4 + "|"]
    taken = {way: [run["seconds"] / steps for run in runs if run["way"] == way] for way in WAYS}
    for way in WAYS:
        ratio = statistics.median(taken[way]) / statistics.median(taken["none"])
        memory = statistics.median(run["peak_bytes"] for run in runs if run["way"] == way)
        name, *settings = way.split()
        shown = ", ".join([f"`{name}`", *(f"`defense.{one}`" for one in settings)])
        lines.append(f"| {shown} | {spread(taken[way], 2)} | {ratio:.2f} | {memory / 1e9:.1f} GB |")
    how = f"{record['rounds']} round(s) of {steps} steps, {BATCH} rows and up to 8 extra ones as long, float32"
    return "\n".join([*lines, "", footer(f"{how}, {record['model']}", record["machine"])])


def main() -> None:
    """Runs every way in a process of its own and writes the record and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = arguments(parser, steps=4)  # so many that an anchor of every fourth step is read in its share of them
    compare(__file__, given, list(WAYS), measure, table, (RECORDS, PAGE, TITLE))


if __name__ == "__main__":
    main()
