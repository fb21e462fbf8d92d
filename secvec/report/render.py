"""From run folders to report.html, report.md, report.csv and report.json."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from secvec.errors import DataError
from secvec.metrics import METRICS
from secvec.report import drawings, exports, leaks, markdown, paired, tables, worst
from secvec.report.axes import MOST_PANELS, Sweep, sweep
from secvec.report.figures.curves import loss_figure
from secvec.report.figures.headline import headline_figure, headline_names
from secvec.report.groups import Comparison, compare
from secvec.report.provenance import failures, provenance, sentence, several, warnings
from secvec.report.records import Curves, Run, kept, load_curves, load_runs
from secvec.report.samples import SHOWN, sample_sets
from secvec.report.style import SERIES, inline_svg
from secvec.runs.files import write_atomic

READING = (
    "Mean over seeds with its 95 % interval (Student t over the seeds' means), then seeds × prompts. ↓ lower and "
    "↑ higher is better, →0 nearer zero. All columns but the base are measured after fine-tuning with no vector on. "
    "A group's value is set in bold only when it is best and its interval meets no other group's; the base is a "
    "reference and does not compete."
)
MOST_ROWS, MOST_RUNS, MOST_FAILURES, MOST_NOTES = 120, 500, 100, 40  # in the page; the files hold all
INDENTED = 200  # records up to which report.json is set out for people


@dataclass(frozen=True)
class Report:
    """Everything that was read; `shown` is what stands side by side, `curves` the telemetry of its groups by index."""

    root: Path
    runs: Sequence[Run]
    comparison: Comparison
    shown: Comparison
    sweep: Sweep | None
    curves: dict[int, list[Curves]]
    notes: Sequence[str]

    @property
    def many(self) -> bool:
        """Whether only a part of the groups is shown side by side."""
        return len(self.shown.groups) < len(self.comparison.groups)


def read(dirs: Sequence[Path], to: Path | None = None) -> Report:
    """Load the runs under `dirs` for a report in `to` (default: the first of them).

    Raises DataError when a record is broken, there is none, or the report would overwrite the only copy of records.
    """
    runs, root = load_runs(dirs), to or dirs[0]
    for folder in dirs:
        if root.resolve().is_relative_to(folder.resolve()) and kept(folder):
            raise DataError(f"{folder} holds kept records and no runs: have the report written elsewhere, by --to DIR")
    comparison = compare(runs)
    shown = worst.focus(comparison)
    curves: dict[int, list[Curves]] = {}
    notes: list[str] = []
    for index, group in enumerate(shown.groups):
        for run in group.runs:
            found, note = load_curves(run)
            notes += [note] if note else []
            if found:
                curves.setdefault(index, []).append(found)
    return Report(root, runs, comparison, shown, sweep(comparison), curves, notes)


def write(report: Report) -> Path:
    """Write the four files; the path of report.html."""
    page = _page(report)
    write_atomic(report.root / "report.json", _records(report.runs))
    write_atomic(report.root / "report.csv", exports.runs_csv(report.runs, report.comparison, report.root))
    write_atomic(report.root / "report.md", markdown.render(page))
    path = report.root / "report.html"
    write_atomic(path, _html(page, report))
    return path


def save_figures(report: Report, folder: Path) -> list[Path]:
    """Write every figure as .svg and .png; the paths of those there was data for."""
    return drawings.save_all(report.shown, report.comparison, report.sweep, report.curves, folder)


def save_tables(report: Report, folder: Path) -> list[Path]:
    """Write every table whole, as .csv, .tex and .md; the paths of those there was data for."""
    comparison = report.comparison

    def fit(table: tables.Table) -> tables.Table:
        return table.turned() if report.many else table

    corner = "Configuration" if report.many else "Metric"
    of = {
        "results": ("Results after fine-tuning", corner, fit(tables.main_table(comparison))),
        "worst": ("Worst case of each defense", "Defense", worst.worst_table(comparison)),
        "paired": ("Paired differences", "Metric", paired.paired_table(comparison)),
        "leaks": ("Leak probes", corner, fit(leaks.leak_table(comparison))),
        "mechanism": ("Mechanism", corner, fit(tables.mechanism_table(comparison))),
        "runs": ("All runs", "Run folder", tables.run_table(report.runs, comparison, report.root)),
    }
    return exports.save_tables(of, folder)


def _records(runs: Sequence[Run]) -> str:
    """All records as JSON: set out, or one to a line where there are many; NaN and infinities are null."""

    def dump(value: Any) -> str:
        try:
            return json.dumps(value, indent=1 if few else None, ensure_ascii=False, allow_nan=False)
        except ValueError:
            return dump(_finite(value))

    few = len(runs) <= INDENTED
    if few:
        return dump([run.record for run in runs]) + "\n"
    return "[\n" + ",\n".join(dump(run.record) for run in runs) + "\n]\n"


def _page(report: Report) -> dict[str, Any]:
    """Values that the HTML page and the Markdown share."""
    runs, comparison, shown = report.runs, report.comparison, report.shown
    samples = sample_sets(shown)
    counts = ", ".join(f"{count} {stream}" for stream, count in SHOWN.items())
    seeds = ", ".join(dict.fromkeys(str(found.seed) for found in samples))
    main, failed = tables.main_table(comparison), failures(runs)
    return {
        "title": "Security vectors: comparison of defenses",
        "sentence": sentence(runs, comparison),
        "provenance": provenance(runs),
        "warnings": warnings(runs, comparison),
        "failures": failed[:MOST_FAILURES],
        "failures_left_out": f"The first {MOST_FAILURES} of {len(failed):,}." if len(failed) > MOST_FAILURES else "",
        "reading": READING,
        "dagger": markdown.DAGGER,
        "groups": comparison.groups,
        "shown_note": (
            f"There are {len(comparison.groups):,} configurations. What stands side by side (Figure 1, leak probes, "
            "mechanism, loss, answers) is the worst case of each defense; the tables of results and runs may be cut. "
            "report.csv holds every run; --tables and --figures write all tables and figures whole."
        ) if report.many else "",
        "corner": "Configuration" if report.many else "Metric",
        "main": main.turned().capped(MOST_ROWS) if report.many else main,
        "worst": worst.worst_table(comparison),
        "worst_reading": worst.READING,
        "paired": paired.paired_table(comparison).capped(MOST_ROWS),
        "paired_reading": paired.reading(comparison),
        "leaks": leaks.leak_table(shown),
        "leaks_reading": leaks.READING,
        "mechanism": tables.mechanism_table(shown),
        "runs": tables.run_table(runs[:MOST_RUNS], comparison, report.root, len(runs)),
        "answers": f"The first prompts of each test stream as they stand in the files ({counts}), not picked; "
        f"seed {seeds}. The same prompt goes to every column.",
        "samples": samples,
        "notes": several(report.notes, MOST_NOTES),
    }  # fmt: skip


def _html(page: dict[str, Any], report: Report) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    shown = report.shown
    headline: list[Markup] = []
    losses: list[tuple[str, Markup | None]] = []
    if shown.groups:
        for name in headline_names(shown):
            told = f"{METRICS[name].label} of each column with its interval; the values are in the results table"
            headline.append(Markup(inline_svg(headline_figure(shown, [name]), f"f1-{name}", told)))
    for index, group in enumerate(shown.groups):
        if index in report.curves:
            told = f"Loss over fine-tuning steps, {group.label}"
            drawn = loss_figure(shown.groups, report.curves, [index])
            losses.append((group.label, Markup(inline_svg(drawn, f"f2-{index}", told))))
        else:
            losses.append((group.label, None))
    swept: dict[str, list[Markup]] = {}
    for one in drawings.swept(report.sweep, whole=False):
        swept.setdefault(one.metric, []).append(Markup(inline_svg(one.draw(), f"f-{one.name}", one.about)))
    scatters = [
        Markup(inline_svg(one.draw(), f"f-{one.name}", one.about))
        for one in drawings.scatters(report.comparison)[:MOST_PANELS]
    ]
    protections = [
        Markup(inline_svg(one.draw(), f"f-{one.name}", one.about)) for one in drawings.protection(report.comparison)
    ]
    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                      trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    script = Markup((Path(__file__).parent / "page.js").read_text(encoding="utf-8"))
    template = env.get_template("template.html.j2")
    return template.render(**page, headline=headline, losses=losses, series=SERIES, drawn=bool(report.curves),
                           swept=swept, sweep=report.sweep, scatters=scatters, protections=protections, script=script,
                           script_hash=base64.b64encode(sha256(script.encode()).digest()).decode())  # fmt: skip


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as null, which JSON can hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
