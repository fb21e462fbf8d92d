"""The main table in the terminal."""

from dataclasses import replace

from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from secvec.errors import several
from secvec.metrics import METRICS
from secvec.report.provenance import failures
from secvec.report.render import Report
from secvec.report.tables import Table, main_table
from secvec.report.worst import BESIDE

CORNER, COLUMN = 40, 18  # characters: the names of metrics, a value with its interval


def show(report: Report) -> None:
    """Print the main table, and the runs that did not complete."""
    console = Console()
    if report.comparison.groups:
        data = main_table(report.shown)
        fits = CORNER + COLUMN * len(data.columns) <= console.width
        data = data if fits else _main_metrics(data, console.width)
        which = ", worst case of each defense" if report.many else ""
        out = Drawn(title=f"After fine-tuning{which}: mean over seeds, 95 % interval", title_justify="left")
        out.add_column(data.corner, no_wrap=fits, overflow="fold")
        for name in data.columns:
            out.add_column(Text(name), justify="right")
        for _, rows in data.sections:
            for row in rows:
                cells = [Text(f"{c.value}\n{c.interval}".strip(), style="bold" if c.best else "") for c in row.cells]
                out.add_row(Text(row.title), *cells)
        console.print(out)
    else:
        console.print("No run was completed.")
    lines = [f"{run.record.status}: {run.name}: {why}" for run, why in failures(report.runs)]
    for line in several(lines, 20):
        console.print(Text(line))


def _main_metrics(data: Table, width: int) -> Table:
    """A line for each configuration, with as many of the metrics of `BESIDE` as fit, two at least."""
    longest = max(map(len, data.columns)) + 4
    labels = {METRICS[name].label for name in BESIDE[: max(2, (width - longest) // COLUMN)]}
    kept = [(title, [row for row in rows if row.label in labels]) for title, rows in data.sections]
    return replace(data, sections=kept).turned()
