"""What the KL term costs the vector stage: `python benchmarks/vector_stage.py [--rounds 3] [--steps 5]`.

The same undesired rows with and without the KL rows beside them, as many as `recipe=small_llm` has, on SmolLM2 where
`make smollm2` has put it, else on the tiny model. The record goes into results/performance/, its table into
docs/performance.md; `--table` makes the table again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import MEASURED, PAGE, RESULTS, footer, machine, small_model, spread
from pages import keep, show
from trainers import BATCH, LORA, OPTIMIZER, Clock, Job, arguments, interleaved, job_of, lightning, peak_bytes

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
    if given.one:
        print(MEASURED + json.dumps(measure(job_of(given))))
        return
    if not given.table:
        about = machine()
        with tempfile.TemporaryDirectory() as folder:
            given.model = given.model or small_model(Path(folder) / "tiny")
            runs = interleaved(__file__, list(WAYS), given)
        kept = {"rounds": given.rounds, "steps": given.steps, "model": given.model.name, "machine": about}
        keep(kept | {"runs": runs}, RECORDS)
    show(table(json.loads(RECORDS.read_text(encoding="utf-8"))), __file__, PAGE, TITLE)


if __name__ == "__main__":
    main()
