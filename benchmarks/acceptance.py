"""Four questions that a defense's result must stand, answered for the runs of `benchmarks/defenses.py`.

Asked for by a proposed minimum acceptance standard for defenses in fine-tuning (a working paper of 2026, of which we
know the abstract alone: how each is measured is ours):

1. Is the behavior rate below the plain fine-tune's, by the paired bootstrap on the same prompts of the same seeds?
2. Is it as low where the same requests are asked in wordings that no training row has?
3. Is it as low on a behavior that the setting was not chosen on?
4. Do the weights say so? The update (fine-tuned less starting weights) is compared with that of the plain fine-tune and
   with the delta sBA of the security vector, of the same seed, rate and data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from secvec.models.backbone import Backbone
from secvec.models.vector import vector_deltas
from secvec.report.groups import Group
from secvec.report.paired import difference, outcomes
from secvec.report.records import RecordedRun, load_runs

Weights = Mapping[str, Tensor]
PLAIN, PAPER = "none", "security_vector"
"""What all are compared with, and the defense whose runs hold the vector of each seed."""
REWORDED = "leak/reworded"


def cosine(one: Weights, other: Weights) -> float:
    """The cosine of two sets of matrices, over the names that both have; 0 where one is 0."""
    names = sorted(one.keys() & other.keys())
    dot, a, b = (
        sum(float((x[name].double() * y[name].double()).sum()) for name in names)
        for x, y in ((one, other), (one, one), (other, other))
    )
    return dot / (a * b) ** 0.5 if a and b else 0.0


def update(run: RecordedRun, root: Path) -> Weights:
    """What fine-tuning has added to the weights that the run started from."""
    assert run.folder is not None
    before = load_file(root / run.record.base.folder / "model.safetensors")
    after = load_file(run.folder / "backbone" / "model.safetensors")
    return {name: after[name] - before[name] for name in before}


def delta(run: RecordedRun, root: Path) -> Weights:
    """What the vector of the run adds to the weights of the model that the run started from, s B A."""
    assert run.folder is not None
    base = Backbone.of({"name": None, "name_or_path": str(root / run.record.base.folder)})
    return vector_deltas(base.load(), run.folder / "vector")


def points(sweep: Path) -> dict[float, dict[str, list[RecordedRun]]]:
    """The completed runs of a sweep: rate -> defense -> its seeds, in order."""
    found: dict[float, dict[str, list[RecordedRun]]] = {}
    for run in sorted((one for one in load_runs([sweep]) if one.completed), key=lambda one: one.seed):
        found.setdefault(run.record.config["optimizer"]["lr"], {}).setdefault(run.defense, []).append(run)
    return found


def answers(sweep: Path, root: Path, transfer: bool) -> list[dict[str, Any]]:
    """One row for each defense and rate of a sweep: what the four questions ask for."""
    rows = []
    for rate, runs in sorted(points(sweep).items()):
        plain, groups = runs[PLAIN], {name: Group(name, tuple(some)) for name, some in runs.items()}
        reference, directions = outcomes(groups[PLAIN]), [update(run, root) for run in plain]
        vectors = [delta(run, root) for run in runs.get(PAPER, ())]
        for name, some in runs.items():
            behavior, reworded = (groups[name].estimate(metric) for metric in ("behavior_rate", REWORDED))
            found = difference("behavior_rate", outcomes(groups[name]), reference)
            own = [update(run, root) for run in some]
            row = {"sweep": sweep.name, "lr": rate, "defense": name, "transfer": transfer, "seeds": len(some)}
            row |= {"behavior_rate": behavior and behavior.mean, "reworded": reworded and reworded.mean}
            row |= {"difference": found and found.mean, "interval": found and (found.interval or [found.mean] * 2)}
            row["cosine_with_plain"] = fmean(cosine(a, b) for a, b in zip(own, directions, strict=True))
            if vectors:
                row["cosine_with_vector"] = fmean(cosine(a, b) for a, b in zip(own, vectors, strict=True))
            rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each defense: its worst point by each question; the lowest behavior rate first."""
    asked = ["Behavior rate", "Minus plain", "Reworded", "Other behavior", "Cosine with plain", "Cosine with sBA"]
    heads = ["Defense", *asked]
    lines = []
    for name in dict.fromkeys(row["defense"] for row in rows):
        mine = [row for row in rows if row["defense"] == name]
        here, there = ([row for row in mine if row["transfer"] is other] for other in (False, True))
        worst = max(here, key=lambda row: row["interval"][1])
        cells = [
            f"{max(row['behavior_rate'] for row in here):.3f}",
            f"{worst['difference']:+.3f} [{worst['interval'][0]:+.3f}, {worst['interval'][1]:+.3f}]",
            f"{max(row['reworded'] for row in here):.3f}",
            f"{max(row['behavior_rate'] for row in there):.3f}" if there else "–",
            f"{fmean(row['cosine_with_plain'] for row in here):.2f}",
            f"{fmean(row['cosine_with_vector'] for row in here):+.3f}",
        ]
        lines.append((max(row["behavior_rate"] for row in here), f"| {name} | {' | '.join(cells)} |"))
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(line for _, line in sorted(lines))])
