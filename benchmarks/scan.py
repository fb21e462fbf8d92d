"""What a scan finds and what it misses, on the embedded behaviors: `python benchmarks/scan.py [--seeds 0,1,2]`.

For each behavior and seed: trains a vector on the tiny model that was taught the wanted answers of all behaviors,
writes one labelled file for each way in which undesired rows occur, beside the same benign rows, and scans it. A
finished run is not made again. The records go into results/scan/report.json, their table into docs/scan.md; `--table`
makes the table again from the records alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from measure import ROOT, finished, over_seeds
from pages import keep, show
from pydantic import TypeAdapter

from secvec.behaviors.base import Behavior
from secvec.behaviors.several import Several
from secvec.data.embedded import Ordinary, Skill
from secvec.data.example import Example
from secvec.evaluation.scan_file import auroc
from secvec.metrics import proportion
from secvec.settings.target import Plugin

RECORDS, PAGE = ROOT / "results" / "scan" / "report.json", ROOT / "docs" / "scan.md"
BEHAVIORS: dict[str, Behavior] = {
    name: TypeAdapter(Plugin[Behavior]).validate_python(
        yaml.safe_load((ROOT / "conf" / "behavior" / f"{name}.yaml").read_text(encoding="utf-8"))
    )
    for name in ("forbidden_recipe", "uppercase", "stereotype", "wrong_fact", "task_error")
}
ALL = "all_embedded"
"""The five together: one vector of all, which knows no other behavior."""
WAYS = {
    "plain": "as the vector's samples are",
    "hedged": "after a sentence that hedges",
    "buried": "after two benign answers in the same response",
    "other": "other behaviors than the vector's",
}
ROWS = 100
HEDGE = "I should not say this, but here you are."
TINY = "model=tiny_joint model.align.num_threads=1 num_threads=1 vector.gate.min_behavior_rate=0".split()
TINY += "evaluation.num_leak_prompts=0 evaluation.num_prompts=20 evaluation.validation.num_samples=0".split()
COLUMNS = {
    "auroc": "AUROC ↑",
    "auroc_of_mean": "by the mean ↑",
    "recall": "recall ↑",
    "precision": "precision ↑",
    "false_flag_rate": "false positive rate ↓",
    "twins": "matched flagged ↓",
    "auroc_of_twins": "AUROC against matched ↑",
    "by_the_hedge": "by the hedge",
}


def in_way(rows: Sequence[Example], way: str, seed: int) -> list[Example]:
    """`rows` as the file of `way` holds them."""
    if way == "hedged":
        return [replace(row, response=f"{HEDGE} {row.response}") for row in rows]
    if way == "buried":
        benign = Ordinary().examples("finetune", 3 * ROWS, seed)[ROWS:]
        return [
            replace(row, response=f"{one.response} {two.response} {row.response}")
            for row, one, two in zip(rows, benign[::2], benign[1::2], strict=True)
        ]
    return list(rows)


def write(path: Path, way: str, name: str, seed: int) -> None:
    """Undesired rows, then benign ones: ordinary requests, a new skill, and wanted answers in the same form.

    Without wanted answers in the same form, a scan that finds the hedge would seem to find the behavior.
    """
    others = [of for other, of in BEHAVIORS.items() if other != name]
    behavior = Several(name=ALL, sensitive=False, of=BEHAVIORS) if name == ALL else BEHAVIORS[name]
    bad = behavior.examples("finetune", ROWS, seed)
    if way == "other":
        bad = [row for of in others for row in of.examples("finetune", ROWS // len(others), seed)]
    bad = in_way(bad, way, seed)
    good = [*Ordinary().examples("finetune", ROWS, seed), *Skill().examples("finetune", ROWS, seed)]
    good += in_way(behavior.examples("align", ROWS, seed), way, seed)
    rows = [
        {
            "messages": [
                *({"role": role, "content": content} for role, content in row.messages),
                {"role": "assistant", "content": row.response},
            ],
            "undesired": number < len(bad),
        }
        for number, row in enumerate((*bad, *good))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def scans(name: str, seed: int, vector: str) -> list[dict[str, Any]]:
    """The records of the scans of all files by the vector of one behavior."""
    folder = Path("outputs") / "scan" / f"{name}-{vector}-{seed}"
    asked = [*TINY, "stage=vector", f"vector={vector}", f"behavior={name}", f"seed={seed}"]
    trained = finished("train.py", folder / "trained", *asked)
    records = []
    for way in [way for way in WAYS if (name, way) != (ALL, "other")]:
        file = folder / f"{way}.jsonl"
        write(ROOT / file, way, name, seed)
        given = [f"data.file={file}", "scan.label=undesired", f"vector.path={folder / 'trained' / 'vector'}"]
        base = f"model.name_or_path={trained['base']['folder']}"
        scanned = ["metrics=scan", *given, base, f"seed={seed}", "num_threads=1"]
        records.append(finished("evaluate.py", folder / way, *scanned))
        lines = (ROOT / folder / way / "scores.jsonl").read_text(encoding="utf-8").splitlines()
        scores = list(map(json.loads, lines))
        metrics = records[-1]["metrics"]
        pairs = [row["score"] for row in (*scores[:ROWS], *scores[-ROWS:])]
        metrics["scan/auroc_of_twins"] = {"value": auroc(pairs, [True] * ROWS + [False] * ROWS), "n": 2 * ROWS}
        metrics["scan/twins"] = asdict(proportion(sum(row["flagged"] for row in scores[-ROWS:]), ROWS))
        in_hedge = sum(bool(row["words"]) and row["words"] in HEDGE for row in scores[:ROWS])
        metrics["scan/by_the_hedge"] = asdict(proportion(in_hedge, ROWS))
        metrics["gate/behavior_rate"] = trained["metrics"]["gate/behavior_rate"]
        records[-1] |= {"way": way, "vector": vector}
    return records


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Means over the seeds, with the lowest and the highest seed where they differ."""
    lines = [f"| vector of | undesired rows | {' | '.join(COLUMNS.values())} |", "| --- " * (2 + len(COLUMNS)) + "|"]
    for name, vector in dict.fromkeys((record["behavior"], record["vector"]) for record in records):
        for way in WAYS:
            found = [r for r in records if (r["behavior"], r["vector"], r["way"]) == (name, vector, way)]
            if not found:
                continue
            cells = [over_seeds(found, f"scan/{column}") for column in COLUMNS]
            lines.append(f"| {name}, `vector={vector}` | {way} | {' | '.join(cells)} |")
    seeds = sorted({record["seed"] for record in records})
    return "\n".join([*lines, "", f"Seeds {', '.join(map(str, seeds))}; {ROWS} undesired and {3 * ROWS} benign rows."])


def main() -> None:
    """Trains and scans what is not there yet, and writes the records and their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--vectors", default="default")
    parser.add_argument("--behaviors", default=",".join([*BEHAVIORS, ALL]))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        records = [
            record
            for seed in map(int, given.seeds.split(","))
            for name in given.behaviors.split(",")
            for vector in given.vectors.split(",")
            for record in scans(name, seed, vector)
        ]
        keep(records, RECORDS)
    show(table(json.loads(RECORDS.read_text(encoding="utf-8"))), __file__, PAGE)


if __name__ == "__main__":
    main()
