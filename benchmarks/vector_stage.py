"""What the KL term costs the vector stage: `python benchmarks/vector_stage.py [--rounds 3] [--steps 5]`.

The same undesired rows with and without the KL rows beside them, as many as `recipe=small_llm` has, on SmolLM2 where
`make smollm2` has put it, else on the tiny model. The record goes into results/performance/, its table into
docs/performance.md; `--table` makes the table again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

from measure import PAGE, RESULTS, footer, spread
from trainers import BATCH, LORA, OPTIMIZER, Clock, Job, arguments, compare, lightning, peak_bytes

RECORDS = RESULTS / "vector_stage.json"
TITLE = "The KL term of the vector stage"
WAYS = {"without_kl": "`vector.kl_weight=0`", "with_kl": "with the KL term"}
KL_BATCH = 6
"""KL rows of a step, beside eight undesired ones."""


def measure(job: Job) -> dict[str, Any]:
    """Seconds of the steps, peak memory and losses of one way, in this process."""
    from secvec.data.batch import Encoded
    from secvec.module import SecVecModule
    from secvec.settings.schema import ModelSettings

    has_kl = job.way == "with_kl"
    undesired, beside = ([(Encoded(ids, p), n != BATCH) for ids, p in job.rows(n)] for n in (BATCH, KL_BATCH))
    rows = []
    for step in range(job.steps + 1):
        rows += undesired[step * BATCH : (step + 1) * BATCH]
        rows += beside[step * KL_BATCH : (step + 1) * KL_BATCH] if has_kl else []
    settings = ModelSettings(name="model", name_or_path=str(job.model))
    vector = LORA.model_dump() | {"kl_weight": float(has_kl)}
    module, clock = SecVecModule("vector", settings, vector, optimizer=OPTIMIZER), Clock(job.device)
    losses = lightning(module, rows, BATCH + KL_BATCH * has_kl, job, clock)
    seconds = clock.ends[job.steps] - clock.ends[0]
    return {"way": job.way, "seconds": seconds, "losses": losses, "peak_bytes": peak_bytes(job.device)}


def table(record: Mapping[str, Any]) -> str:
    """Medians over the rounds, with the lowest and the highest."""
    runs, steps = record["runs"], record["steps"]
    lines = ["| | seconds per step ↓ | of the time without (aim 1.5) | peak memory ↓ | first loss |"]
    lines += ["| --- " * 5 + "|"]
    taken = {way: [run["seconds"] / steps for run in runs if run["way"] == way] for way in WAYS}
    for way, name in WAYS.items():
        ratio = statistics.median(taken[way]) / statistics.median(taken["without_kl"])
        first = next(run["losses"][0] for run in runs if run["way"] == way)  # the KL of a new vector is 0
        memory = statistics.median(run["peak_bytes"] for run in runs if run["way"] == way)
        lines.append(f"| {name} | {spread(taken[way], 2)} | {ratio:.2f} | {memory / 1e9:.1f} GB | {first:.4f} |")
    how = f"{record['rounds']} rounds of {steps} steps, {BATCH} undesired and {KL_BATCH} KL rows, float32"
    return "\n".join([*lines, "", footer(f"{how}, {record['model']}", record["machine"])])


def main() -> None:
    """Runs both ways in processes of their own and writes the record and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = arguments(parser)
    compare(__file__, given, list(WAYS), measure, table, (RECORDS, PAGE, TITLE))


if __name__ == "__main__":
    main()
