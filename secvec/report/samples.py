"""Answers to the same test prompts, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secvec.report.groups import Comparison, Group
from secvec.report.records import RecordedRun, load_predictions
from secvec.report.tables import column_phases
from secvec.runs.excerpt import Text, shorten

SHOWN = {"undesired": 6, "task": 3, "ordinary": 3}
Index = dict[tuple[str, str, str], dict[str, Any]]  # (phase, stream, id) -> row


@dataclass(frozen=True, slots=True)
class Answer:
    """One column's answer; `missing` gives the reason when there is none."""

    column: str
    on: bool
    text: Text
    verdict: str = ""
    incoherent: bool = False
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One test prompt with the answers of all columns."""

    id: str
    stream: str
    prompt: Text
    reference: Text
    answers: Sequence[Answer]


@dataclass(frozen=True, slots=True)
class SampleSet:
    """Samples of one behavior and model from one seed; `notes` say what is missing."""

    title: str
    seed: int
    samples: Sequence[Sample]
    notes: Sequence[str]


def sample_sets(comparison: Comparison) -> list[SampleSet]:
    """One set for each base column."""
    return [
        _sample_set(base, [g for g in comparison.groups if comparison.base_of(g) is base]) for base in comparison.bases
    ]


def _sample_set(base: Group, groups: Sequence[Group]) -> SampleSet:
    loaded: dict[int, tuple[Index, str | None]] = {}

    def rows_of(run: RecordedRun) -> tuple[Index, str | None]:
        if id(run) not in loaded:
            rows, note = load_predictions(run)
            loaded[id(run)] = {tuple(str(r.get(k)) for k in ("phase", "stream", "id")): r for r in rows}, note  # type: ignore[misc]
        return loaded[id(run)]

    # Of the groups shown, not all that share the base: with thousands of runs their answers would all be read.
    runs = [run for group in groups for run in group.runs]
    title = base.label.removeprefix("base").lstrip(" ·")
    seeds = sorted({run.seed for run in runs})
    seed = next((s for s in seeds if any(rows_of(r)[0] for r in runs if r.seed == s)), None)
    if seed is None:
        return SampleSet(title, seeds[0], [], [f"No answers: {note}." for r in runs if (note := rows_of(r)[1])])

    notes = [note for r in runs if r.seed == seed and (note := rows_of(r)[1])]
    columns = [("base", "base", _merge([rows_of(r) for r in runs if r.seed == seed]))]
    for group in groups:
        merged = _merge([rows_of(r) for r in group.runs if r.seed == seed])
        why = None if merged else f"no answers recorded for seed {seed}"
        columns += [(phase, label, merged) for phase, label in column_phases(group)]
        notes += [f"{group.label}: {why}"] if why else []
    samples = [_sample(stream, name, columns) for stream, name in _chosen(columns)]
    return SampleSet(title, seed, samples, notes)


def _merge(parts: Sequence[tuple[Index, str | None]]) -> Index:
    return {key: row for index, _ in reversed(parts) for key, row in index.items()}


def _chosen(columns: Sequence[tuple[str, str, Index]]) -> list[tuple[str, str]]:
    """(stream, id) of the first prompts in the order of the files: those that most columns answered come first."""
    order: dict[tuple[str, str], int] = {}
    for phase, _, index in columns:
        for p, stream, name in index:
            if p == phase:
                order[stream, name] = order.get((stream, name), 0) + 1
    chosen: list[tuple[str, str]] = []
    for stream, count in SHOWN.items():
        mine = sorted((key for key in order if key[0] == stream), key=lambda key: -order[key])
        chosen += mine[:count]
    return chosen


def _sample(stream: str, name: str, columns: Sequence[tuple[str, str, Index]]) -> Sample:
    found = [index.get((phase, stream, name)) for phase, _, index in columns]
    present = [row for row in found if row]
    sensitive = any(row.get("sensitive") for row in present)
    answers = []
    for (phase, label, _), row in zip(columns, found, strict=True):
        if row is None:
            answers.append(Answer(label, phase == "active", Text(""), missing="not recorded"))
            continue
        text = shorten(row.get("response"), sensitive)
        verdict, incoherent = str(row.get("verdict") or ""), row.get("coherent") is False
        answers.append(Answer(label, phase == "active", text, verdict, incoherent))
    first = present[0]
    return Sample(
        name, stream, shorten(first.get("prompt"), sensitive), shorten(first.get("reference"), sensitive), answers
    )
