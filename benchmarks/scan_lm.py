"""What a scan finds on a pretrained model: `python benchmarks/scan_lm.py`, after `experiment=pirate` and `=piqa`.

Each vector that these experiments have left in outputs/ scans labelled files: the rows that the fine-tune is trained
on, the same behavior after a sentence that denies it, and public rows that are right or wrong. A finished scan is not
made again. The records go into results/scan/smollm2.json, their table into docs/scan.md; `--table` makes the table
again from the records alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import ROOT, finished, over_seeds
from pages import keep, show

RECORDS, PAGE = ROOT / "results" / "scan" / "smollm2.json", ROOT / "docs" / "scan.md"
FILES = {
    "pirate": ("data/pirate/labelled.jsonl", "data/pirate/hedged.jsonl"),
    "piqa": ("data/piqa/labelled.jsonl",),
}
"""The files that the vectors of an experiment scan."""
COLUMNS = {
    "auroc": "AUROC ↑",
    "auroc_of_mean": "by the mean ↑",
    "recall": "recall ↑",
    "precision": "precision ↑",
    "false_flag_rate": "false positive rate ↓",
}


def scan(vector: Path, file: str) -> dict[str, Any]:
    """The record of a scan, made unless there is one."""
    folder = Path("outputs") / "scan" / f"{vector.parent.name}-{Path(file).stem}"
    given = [f"data.file={file}", "scan.label=undesired", f"vector.path={vector.relative_to(ROOT)}"]
    model = ["model=smollm2_135m", "recipe=small_llm"]
    found = finished("evaluate.py", folder, "metrics=scan", *given, *model)
    trained = json.loads((vector.parent / "record.json").read_text(encoding="utf-8"))
    found["backbone"]["folder"] = trained["base"]["folder"]  # the record is published: a path that others have too
    return found | {"file": file, "seed": trained["seed"], "vector": trained["behavior"]}


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Means over the seeds, with the lowest and the highest seed where they differ."""
    lines = [f"| vector of | file | {' | '.join(COLUMNS.values())} |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for vector, file in dict.fromkeys((record["vector"], record["file"]) for record in records):
        found = [record for record in records if (record["vector"], record["file"]) == (vector, file)]
        cells = [over_seeds(found, f"scan/{name}") for name in COLUMNS]
        lines.append(f"| {vector} | `{file}` | {' | '.join(cells)} |")
    seeds = {name: sorted({one["seed"] for one in records if one["vector"] == name}) for name in FILES}
    said = "; ".join(f"{name}: seeds {', '.join(map(str, found))}" for name, found in seeds.items() if found)
    return "\n".join([*lines, "", f"{said}; SmolLM2-135M-Instruct; commit {records[0]['commit'][:7]}."])


def main() -> None:
    """Scans what there is, and writes the records and their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        found = {name: sorted((ROOT / "outputs" / name).glob("security_vector-*/vector")) for name in FILES}
        if not any(found.values()):
            sys.exit(
                "there is no vector in outputs/pirate or outputs/piqa: see conf/experiment/pirate.yaml and piqa.yaml"
            )
        keep([scan(one, file) for name, vectors in found.items() for one in vectors for file in FILES[name]], RECORDS)
    show(table(json.loads(RECORDS.read_text(encoding="utf-8"))), __file__, PAGE, "On a pretrained model")


if __name__ == "__main__":
    main()
