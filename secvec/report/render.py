"""From run folders to report.html, report.md, report.csv and report.json."""

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

from markupsafe import Markup

from secvec.errors import DataError, several
from secvec.report import drawings, exports, markdown
from secvec.report.axes import MOST_PANELS, Sweep, sweep
from secvec.report.groups import Comparison, compare
from secvec.report.paired import paired_table
from secvec.report.provenance import failures, provenance, sentence, warnings
from secvec.report.records import Curves, RecordedRun, kept_reports, load_curves, load_records, load_runs
from secvec.report.samples import SHOWN, sample_sets
from secvec.report.style import SERIES, inline_svg, template
from secvec.report.tables import Table, leak_table, main_table, mechanism_table, run_table
from secvec.report.worst import focus, worst_table
from secvec.runs.files import write_atomic

log = logging.getLogger(__name__)

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
    runs: Sequence[RecordedRun]
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
        if root.resolve().is_relative_to(folder.resolve()) and kept_reports(folder):
            raise DataError(f"{folder} holds kept records and no runs: have the report written elsewhere, by --to DIR")
    comparison = compare(runs)
    shown = focus(comparison)
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
    _keep_lost_records(report)
    write_atomic(report.root / "report.json", _records(report.runs))
    write_atomic(report.root / "report.csv", exports.runs_csv(report.runs, report.comparison, report.root))
    write_atomic(report.root / "report.md", markdown.render(page))
    path = report.root / "report.html"
    write_atomic(path, _html(page, report))
    return path


def _keep_lost_records(report: Report) -> None:
    """Renames report.json where it has the only copy of records: their runs are gone, and it will be written again."""
    old = report.root / "report.json"
    try:
        kept = load_records(old) if old.is_file() else []
    except DataError:  # not one of ours
        kept = []
    there = {(run.record.key, run.name, run.seed) for run in report.runs}
    lost = sum(run.completed and (run.record.key, run.name, run.seed) not in there for run in kept)
    if lost:
        free = next(path for n in count(1) if not (path := old.with_name(f"report.{n}.json")).exists())
        old.rename(free)
        log.warning("%s has %d records of runs that are gone: it is now %s", old, lost, free)


def save_figures(report: Report, folder: Path) -> list[Path]:
    """Write every figure as .svg and .png; the paths of those there was data for."""
    shown, comparison = report.shown, report.comparison
    every = drawings.headline(shown, whole=True)
    for name in drawings.CURVES:
        every += drawings.curves(name, shown.groups, report.curves, whole=True)
    every += [*drawings.swept(report.sweep, whole=True), *drawings.scatters(comparison)]
    return drawings.save_all([*every, *drawings.protection(comparison)], folder)


def save_tables(report: Report, folder: Path) -> list[Path]:
    """Write every table whole, as .csv, .tex and .md; the paths of those there was data for."""
    comparison = report.comparison
    tables = _tables(comparison, comparison) | {"results": main_table(comparison)}
    if report.many:
        tables |= {name: tables[name].turned() for name in ("results", "leaks", "mechanism")}
    return exports.save_tables(tables | {"runs": run_table(report.runs, comparison, report.root)}, folder)


def _tables(comparison: Comparison, shown: Comparison) -> dict[str, Table]:
    """The tables after that of the results; those with a column for each configuration hold only `shown`."""
    return {
        "worst": worst_table(comparison),
        "paired": paired_table(comparison),
        "leaks": leak_table(shown),
        "mechanism": mechanism_table(shown, comparison),
    }


def _records(runs: Sequence[RecordedRun]) -> str:
    """All records as JSON: indented, or one to a line where there are many."""
    indent = 1 if len(runs) <= INDENTED else None
    return "[\n" + ",\n".join(run.record.as_json(indent) for run in runs) + "\n]\n"


def _page(report: Report) -> dict[str, Any]:
    """Values that the HTML page and the Markdown share."""
    runs, comparison, shown = report.runs, report.comparison, report.shown
    samples = sample_sets(shown)
    counts = ", ".join(f"{count} {stream}" for stream, count in SHOWN.items())
    seeds = ", ".join(dict.fromkeys(str(found.seed) for found in samples))
    main, failed = main_table(comparison), failures(runs)
    tables = _tables(comparison, shown)
    tables["paired"] = tables["paired"].capped(MOST_ROWS)
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
        )
        if report.many
        else "",
        "main": main.turned().capped(MOST_ROWS) if report.many else main,
        "tables": {name: table for name, table in tables.items() if table.sections},
        "runs": run_table(runs[:MOST_RUNS], comparison, report.root, len(runs)),
        "answers": f"The first prompts of each test stream as they stand in the files ({counts}), not picked; "
        f"seed {seeds}. The same prompt goes to every column.",
        "samples": samples,
        "notes": several(report.notes, MOST_NOTES),
    }


def _html(page: dict[str, Any], report: Report) -> str:
    def svg(drawing: drawings.Drawing) -> Markup:
        return Markup(inline_svg(drawing.draw(), f"f-{drawing.name}", drawing.about))

    shown, comparison = report.shown, report.comparison
    losses, during = (drawings.curves(name, shown.groups, report.curves, whole=False) for name in drawings.CURVES)
    drawn = {drawing.heading: svg(drawing) for drawing in losses}
    swept: dict[str, list[Markup]] = {}
    for drawing in drawings.swept(report.sweep, whole=False):
        swept.setdefault(drawing.heading, []).append(svg(drawing))
    figures = {
        "headline": [svg(drawing) for drawing in drawings.headline(shown, whole=False)],
        "losses": [(group.label, drawn.get(group.label)) for group in shown.groups],
        "during": [svg(drawing) for drawing in during],
        "swept": swept,
        "scatters": [svg(drawing) for drawing in drawings.scatters(comparison)[:MOST_PANELS]],
        "protections": [svg(drawing) for drawing in drawings.protection(comparison)],
    }
    script = Markup((Path(__file__).parent / "page.js").read_text(encoding="utf-8"))
    script_hash = base64.b64encode(sha256(script.encode()).digest()).decode()
    return template("template.html.j2").render(
        page | figures, series=SERIES, drawn=bool(drawn), sweep=report.sweep, script=script, script_hash=script_hash
    )
