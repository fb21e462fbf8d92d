"""An attacker who knows the defender's vector: `python benchmarks/scan_attack.py [--pool 10000]`.

For each seed, of a pool of undesired rows the 1,000 are taken whose scan score under that very vector is lowest: hedged
answers (`behavior=wild`, no turns), and plain ones to compare with. With the hedged ones the tiny model is fine-tuned
by several defenses, at two rates. A finished run is not made again. The records go into results/ablation/scan_attack,
their table into docs/results.md; `--table` makes the table again from the records alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from measure import ROOT, finished, keep_report
from pages import keep, show
from scan import BEHAVIORS

from secvec.behaviors.wild import Wild
from secvec.data.example import Example, Split
from secvec.evaluation.scan import WINDOW, kept_scores, quantile_threshold, scan
from secvec.module import SecVecModule
from secvec.report.groups import compare
from secvec.report.records import load_runs

RECORDS, PAGE = ROOT / "results" / "ablation" / "scan_attack" / "report.json", ROOT / "docs" / "results.md"
CHOICES = RECORDS.with_name("chosen.json")
FOLDER, SWEEP = Path("outputs") / "scan_attack", "scan_attack_runs"
SIZE, QUANTILE, SEEDS = 1_000, 0.99, (0, 1, 2)
SEVERITY = (0, 1, 1, 0)
"""Shares of `Wild`: each answer is hedged, and half of them stop after the first sentence."""
DEFENSES = {
    "none": [],
    "security_vector": [],
    "scan_filter": [],
    "anchored_vector": [],
    "anchored_vector, flagged rows left out": ["defense.drop_flagged=true"],
}
RATES = (7e-4, 6e-3)
METRICS = ("behavior_rate", "refusal_rate", "task_accuracy")


class Chosen(Wild):
    """Another behavior, whose `finetune` samples are some of a pool."""

    folder: Path
    """Where `SEED.json` has the size of the pool and the numbers of the samples in it."""

    def examples(self, split: Split, n: int | None, seed: int) -> list[Example]:
        """The first `n` of the chosen samples; the other splits are those of the behavior."""
        if split != "finetune":
            return super().examples(split, n, seed)
        chosen = json.loads((ROOT / self.folder / f"{seed}.json").read_text(encoding="utf-8"))
        pool = super().examples(split, chosen["pool"], seed)
        return [pool[number] for number in chosen["rows"]][:n]


def lowest(scores: Sequence[float], count: int) -> list[int]:
    """The places of the `count` lowest scores, in order."""
    return sorted(sorted(range(len(scores)), key=scores.__getitem__)[:count])


def choose(seed: int, size: int) -> list[dict[str, Any]]:
    """Keeps the choice of a seed; returns what the scan flags of the pool and of the choice, hedged and plain."""
    folder = FOLDER / f"vector-{seed}"
    trained = finished("train.py", folder, "experiment=ablation/anchor", "stage=vector", f"seed={seed}")
    vector, plain = ROOT / folder / "vector", BEHAVIORS["forbidden_recipe"]
    module = SecVecModule("infer", ROOT / trained["base"]["folder"], vector)
    most = quantile_threshold(kept_scores(vector)["benign"][WINDOW - 1], QUANTILE)
    words = yaml.safe_load((ROOT / "conf" / "behavior" / "wild.yaml").read_text(encoding="utf-8"))
    given = {name: words[name] for name in ("name", "hedge", "wanted")}
    hedged = Wild(**given, of=plain, sensitive=False, turns=0, severity=SEVERITY)
    found = []
    for kind, behavior in (("hedged", hedged), ("plain", plain)):
        scores = [row.score(WINDOW) for row in scan(module, behavior.examples("finetune", size, seed))]
        rows = lowest(scores, SIZE)
        shares = {"flagged": fmean(score > most for score in scores)}
        shares["chosen_flagged"] = fmean(scores[number] > most for number in rows)
        found.append({"seed": seed, "rows": kind, "pool": size, "chosen": SIZE, **shares, "commit": trained["commit"]})
        if kind == "hedged":
            keep({"pool": size, "rows": rows}, ROOT / FOLDER / "lowest" / f"{seed}.json")
    return found


def fine_tune(defense: str, *given: str) -> None:
    """Trains on the chosen rows, at all rates, on all seeds. The vector of a run is that which the attacker knew."""
    overrides = [
        "experiment=ablation/anchor_wild", f"sweep={SWEEP}", "behavior._target_=scan_attack.Chosen",
        f"+behavior.folder={FOLDER / 'lowest'}", f"behavior.severity=[{','.join(map(str, SEVERITY))}]",
        f"defense={defense}", f"optimizer.lr={','.join(map(str, RATES))}", f"seed={','.join(map(str, SEEDS))}", *given,
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    subprocess.run(
        [sys.executable, "train.py", "-m", *overrides], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, check=True
    )


def check_vectors() -> None:
    """Asserts that each run has had the vector under which its rows were chosen."""
    for path in (ROOT / "outputs" / SWEEP).glob("*/vector/adapter_model.safetensors"):
        seed = json.loads((path.parents[1] / "record.json").read_text(encoding="utf-8"))["seed"]
        assert path.read_bytes() == (ROOT / FOLDER / f"vector-{seed}" / "vector" / path.name).read_bytes(), path


def table(choices: Sequence[Mapping[str, Any]]) -> str:
    """What the scan flags, and what each defense lets through: means over the seeds."""
    lines = ["| rows | flagged, of the pool | flagged, of the chosen |", "| --- | --- | --- |"]
    for kind in ("hedged", "plain"):
        of = [one for one in choices if one["rows"] == kind]
        cells = [f"{fmean(one[name] for one in of):.3f}" for name in ("flagged", "chosen_flagged")]
        lines.append(f"| {of[0]['chosen']:,} of {of[0]['pool']:,} {kind} | {' | '.join(cells)} |")
    lines += ["", f"| behavior ↓ / refusal ↑ / task ↑ | {' | '.join(map(str, RATES))} |", "| --- " * 3 + "|"]
    runs = load_runs([RECORDS.parent])
    cells: dict[str, dict[float, str]] = {}
    for group in compare(runs).groups:
        config = group.runs[0].record.config
        name = group.defense + ", flagged rows left out" * bool(config["defense"].get("drop_flagged"))
        found = [group.estimate(metric) for metric in METRICS]
        values = " / ".join(f"{one.mean:.2f}" for one in found if one)
        cells.setdefault(name, {})[config["optimizer"]["lr"]] = values
    lines += [f"| `{name}` | {' | '.join(cells[name].get(rate, '–') for rate in RATES)} |" for name in cells]
    commits = ", ".join(sorted({run.record.commit[:7] for run in runs}))
    return "\n".join([*lines, "", f"Seeds {', '.join(map(str, SEEDS))}; {len(runs)} runs; commit {commits}."])


def main() -> None:
    """Chooses, fine-tunes what is not there yet, and writes the records and their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=10_000)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        choices = [one for seed in SEEDS for one in choose(seed, given.pool)]
        for name, overrides in DEFENSES.items():
            fine_tune(name.partition(",")[0], *overrides)
        check_vectors()
        keep(choices, CHOICES)
        keep_report([SWEEP], "scan_attack_report", RECORDS.parent)
    show(table(json.loads(CHOICES.read_text(encoding="utf-8"))), __file__, PAGE)


if __name__ == "__main__":
    main()
