"""The report as Markdown: the same tables and answers, figures named."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from secvec.report.samples import SampleSet, Text
from secvec.report.tables import Table

DAGGER = "† interval over prompts: a single seed, or seeds that agree exactly, show no spread between seeds."


def escape(text: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", re.sub(r"\s*\n\s*", " ⏎ ", str(text).strip()))


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table of texts that are already escaped."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def table(data: Table, about: bool = False) -> list[str]:
    """A table; a section's title is a row of its own; with `about`, what stands below a row's label follows it."""
    rows: list[list[str]] = []
    for title, lines in data.sections:
        if title:
            rows.append([f"**{escape(title)}**", *[""] * len(data.columns)])
        for line in lines:
            cells = [f"**{escape(c.text)}**" if c.best else escape(c.text) for c in line.cells]
            label = line.title + (f" ({line.about})" if about and line.about else "")
            rows.append([escape(label), *cells])
    out = grid([data.corner, *map(escape, data.columns)], rows)
    out += [DAGGER, ""] if data.footnote else []
    return [*out, escape(data.left_out), ""] if data.left_out else out


def samples(sets: Sequence[SampleSet]) -> list[str]:
    """Answers, one table for each prompt."""
    out: list[str] = []
    for found in sets:
        out += [f"### {escape(found.title)}", ""] if found.title else []
        out += [f"- {escape(note)}" for note in found.notes] + [""] * bool(found.notes)
        for sample in found.samples:
            out += [f"**{sample.stream}** `{sample.id.replace('`', '')}`: {_text(sample.prompt)}", ""]
            rows = [["reference", "", _text(sample.reference)]] if sample.reference.text else []
            for a in sample.answers:
                verdict = escape(a.verdict) + (", incoherent" if a.incoherent else "")
                rows.append([escape(a.column), verdict, a.missing or _text(a.text)])
            out += grid(["", "Verdict", "Answer"], rows)
    return out


def _text(text: Text) -> str:
    mark = f" *({text.mark})*" if text.mark else ""
    return (escape(text.text) or "*(empty)*") + mark


def render(page: dict[str, Any]) -> str:
    """The whole report from the same values as the HTML page."""
    out = [f"# {page['title']}", "", escape(page["sentence"]), ""]
    out += [f"- {name}: {escape(value)}" for name, value in page["provenance"]] + [""]
    out += [f"> {escape(warning)}\n" for warning in page["warnings"]]
    out += [escape(page["shown_note"]), ""] if page["shown_note"] else []
    if page["failures"]:
        out += ["## Runs that failed", ""]
        rows = [[escape(run.name), run.record.status, escape(why)] for run, why in page["failures"]]
        out += grid(["Run", "Status", "Error"], rows)
        out += [escape(page["failures_left_out"]), ""] if page["failures_left_out"] else []
    if page["groups"]:
        out += ["## Results", "", escape(page["reading"]), "", *table(page["main"])]
    for data in page["tables"].values():
        out += [f"## {data.title}", "", *([escape(data.reading), ""] if data.reading else []), *table(data)]
    out += ["Figures: in report.html; `python -m secvec.report DIR --figures DIR` writes them as files.", ""]
    out += ["## Answers", "", escape(page["answers"]), "", *samples(page["samples"])] if page["groups"] else []
    out += ["## Runs", "", *table(page["runs"], about=True)]
    if page["notes"]:
        out += ["## Missing or incomplete", "", *[f"- {escape(note)}" for note in page["notes"]], ""]
    return "\n".join(out)
