"""Fine-tunes on 100 to 100,000 undesired samples: `python benchmarks/growth.py [--rounds 3] [--steps 100]`.

The finetune stage of the tiny model as `train.py` runs it: time per sample, largest memory of the process, and the time
from the start of the command to the end of the first step, when the samples are turned into tokens and when an earlier
run has left the tokens. Of each training `--steps` steps are timed; 0: a whole pass. The record goes into
results/performance/, its table into docs/performance.md; `--table` makes the table again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import PAGE, RESULTS, footer, machine, run, spread
from pages import keep, show

RECORDS = RESULTS / "growth.json"
TITLE = "From 100 to 100,000 samples"
BATCH = 16
SETTINGS = f"""
stage=finetune defense=none force=true num_threads=1 data.num_benign=1 finetune.batch_size={BATCH}
telemetry.every_n_steps=0 evaluation.num_leak_prompts=0 evaluation.num_prompts=1 evaluation.validation.num_samples=0
evaluation.validation.every_n_steps=0 model.align.gate=null model.align.num_undesired=60 model.align.num_benign=120
model.align.epochs=1 model.align.num_threads=1 trainer.enable_progress_bar=false
+callbacks.clock._target_=clock.StepClock
""".split()


def measure(samples: int, steps: int, outputs: Path) -> dict[str, Any]:
    """Seconds per sample and to the first step, and peak memory, of one fine-tune with its outputs in a folder."""
    kept, times = (outputs / "cache" / "tokens").is_dir(), outputs / "steps.json"
    epochs = max(1, steps * BATCH // samples)
    given = [f"data.num_harmful={samples}", f"finetune.epochs={epochs}", f"trainer.max_steps={steps or -1}"]
    given += [f"paths.cache={outputs / 'cache'}", f"run_dir={outputs / 'run'}", f"+callbacks.clock.file={times}"]
    shutil.rmtree(outputs / "run", ignore_errors=True)
    start = time.time()
    ran = run(["train.py", *SETTINGS, *given])
    ends = json.loads(times.read_text(encoding="utf-8"))
    between = [after - before for epoch in ends for before, after in pairwise(epoch)]
    return {
        "samples": samples,
        "tokens_kept": kept,
        "seconds_per_sample": statistics.mean(between) / BATCH,
        "first_step": ends[0][0] - start,
        "seconds": ran.seconds,
        "peak_bytes": ran.peak_bytes,
    }


def table(record: Mapping[str, Any]) -> str:
    """Medians over the rounds, with the lowest and the highest."""
    runs = record["runs"]
    head = ["undesired samples", "ms per sample ↓", "peak memory ↓", "first step after (s) ↓", "with kept tokens (s) ↓"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for samples in dict.fromkeys(one["samples"] for one in runs):
        found = [one for one in runs if one["samples"] == samples]
        first = {kept: [one["first_step"] for one in found if one["tokens_kept"] == kept] for kept in (False, True)}
        cells = [f"{samples:,}", spread([1000 * one["seconds_per_sample"] for one in found], 2)]
        cells += [f"{max(one['peak_bytes'] for one in found) / 1e9:.2f} GB", spread(first[False])]
        lines.append(f"| {' | '.join([*cells, spread(first[True]) if first[True] else '–'])} |")
    steps = f"{record['steps']} steps" if record["steps"] else "a whole pass"
    how = f"{record['rounds']} rounds of {steps} in batches of {BATCH}, tiny model, one thread"
    return "\n".join([*lines, "", footer(how, record["machine"])])


def main() -> None:
    """Runs all sizes and writes the record and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", default="100,1000,10000,100000")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        about, runs, sizes = machine(), [], list(map(int, given.samples.split(",")))
        with tempfile.TemporaryDirectory() as folder:
            measure(sizes[0], 2, Path(folder))  # makes the starting model, which all others find
            for number in range(given.rounds):
                for samples in sizes:
                    shutil.rmtree(Path(folder) / "cache" / "tokens", ignore_errors=True)
                    runs.append(measure(samples, given.steps, Path(folder)))
                    if (Path(folder) / "cache" / "tokens").is_dir():  # large data alone is kept
                        runs.append(measure(samples, given.steps, Path(folder)))
                    print(f"round {number + 1}: {samples} samples {runs[-1]['seconds']:.1f} s", flush=True)
        keep({"rounds": given.rounds, "steps": given.steps, "machine": about, "runs": runs}, RECORDS)
    show(table(json.loads(RECORDS.read_text(encoding="utf-8"))), __file__, PAGE, TITLE)


if __name__ == "__main__":
    main()
