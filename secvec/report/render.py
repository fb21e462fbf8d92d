"""From run folders to report.html, report.md and report.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secvec.files import write_atomic
from secvec.report import figures, leaks, markdown, paired, tables
from secvec.report.groups import Comparison, compare
from secvec.report.metrics import METRICS
from secvec.report.provenance import failures, provenance, sentence, warnings
from secvec.report.records import Curves, Run, load_curves, load_runs
from secvec.report.samples import SHOWN, sample_sets
from secvec.report.style import SERIES, inline_svg

READING = (
    "Mean over seeds with its 95 % interval (Student t over the seeds' means), then seeds × prompts. ↓ lower and "
    "↑ higher is better, →0 nearer zero. All columns but the base are measured after fine-tuning with no vector on. "
    "A group's value is set in bold only when it is best and its interval meets no other group's; the base is a "
    "reference and does not compete."
)


@dataclass(frozen=True)
class Report:
    """Everything that was read; `curves` maps the index of a group to the telemetry of its runs."""

    root: Path
    runs: Sequence[Run]
    comparison: Comparison
    curves: dict[int, list[Curves]]
    notes: Sequence[str]


def read(dirs: Sequence[Path]) -> Report:
    """Load the runs under `dirs`; DataError when a record is broken or there is none."""
    runs = load_runs(dirs)
    comparison = compare(runs)
    curves: dict[int, list[Curves]] = {}
    notes: list[str] = []
    for index, group in enumerate(comparison.groups):
        for run in group.runs:
            found, note = load_curves(run)
            notes += [note] if note else []
            if found:
                curves.setdefault(index, []).append(found)
    return Report(dirs[0], runs, comparison, curves, notes)


def write(report: Report) -> Path:
    """Write the three files into the first directory; the path of report.html."""
    page = _page(report)
    records = json.dumps([_finite(run.record) for run in report.runs], indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(report.root / "report.json", records + "\n")
    write_atomic(report.root / "report.md", markdown.render(page))
    path = report.root / "report.html"
    write_atomic(path, _html(page, report))
    return path


def save_figures(report: Report, folder: Path) -> list[Path]:
    """Write both figures as .svg and .png; the paths of those there was data for."""
    written = []
    for suffix in (".svg", ".png"):
        if report.comparison.groups:
            figures.save_headline(report.comparison, folder / f"headline{suffix}")
            written.append(folder / f"headline{suffix}")
        if report.curves:
            figures.save_losses(report.comparison.groups, report.curves, folder / f"losses{suffix}")
            written.append(folder / f"losses{suffix}")
    return written


def _page(report: Report) -> dict[str, Any]:
    """Values that the HTML page and the Markdown share."""
    runs, comparison = report.runs, report.comparison
    samples = sample_sets(comparison)
    counts = ", ".join(f"{count} {stream}" for stream, count in SHOWN.items())
    seeds = ", ".join(dict.fromkeys(str(found.seed) for found in samples))
    return {
        "title": "Security vectors: comparison of defenses",
        "sentence": sentence(runs, comparison),
        "provenance": provenance(runs),
        "warnings": warnings(runs, comparison),
        "failures": failures(runs),
        "reading": READING,
        "dagger": markdown.DAGGER,
        "groups": comparison.groups,
        "main": tables.main_table(comparison),
        "paired": paired.paired_table(comparison),
        "paired_reading": paired.READING,
        "leaks": leaks.leak_table(comparison),
        "leaks_reading": leaks.READING,
        "mechanism": tables.mechanism_table(comparison),
        "runs": tables.run_table(runs, comparison, report.root),
        "answers": f"The first prompts of each test stream as they stand in the files ({counts}), not picked; "
        f"seed {seeds}. The same prompt goes to every column.",
        "samples": samples,
        "notes": report.notes,
    }


def _html(page: dict[str, Any], report: Report) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    comparison = report.comparison
    headline: list[Markup] = []
    losses: list[tuple[str, Markup | None]] = []
    if comparison.groups:
        for name in figures.headline_names(comparison):
            told = f"{METRICS[name].label} of each column with its interval; the values are in the results table"
            headline.append(Markup(inline_svg(figures.headline_figure(comparison, [name]), f"f1-{name}", told)))
    for index, group in enumerate(comparison.groups):
        if index in report.curves:
            told = f"Loss over fine-tuning steps, {group.label}"
            drawn = figures.loss_figure(comparison.groups, report.curves, [index])
            losses.append((group.label, Markup(inline_svg(drawn, f"f2-{index}", told))))
        else:
            losses.append((group.label, None))
    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                      trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    template = env.get_template("template.html.j2")
    return template.render(**page, headline=headline, losses=losses, series=SERIES, drawn=bool(report.curves))


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as null, which JSON can hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
