"""The main table in the terminal."""

from __future__ import annotations

from secvec.report.provenance import failures, several
from secvec.report.render import Report
from secvec.report.tables import main_table


def show(report: Report) -> None:
    """Print the main table, and the runs that did not complete."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if report.comparison.groups:
        data = main_table(report.shown)
        which = ", worst case of each defense" if report.many else ""
        out = Table(title=f"After fine-tuning{which}: mean over seeds, 95 % interval", title_justify="left")
        out.add_column("Metric", no_wrap=True)
        for name in data.columns:
            out.add_column(Text(name), justify="right")
        for _, rows in data.sections:
            for row in rows:
                cells = [Text(f"{c.value}\n{c.interval}".strip(), style="bold" if c.best else "") for c in row.cells]
                out.add_row(Text(f"{row.label} {row.arrow}".strip()), *cells)
        console.print(out)
    else:
        console.print("No run was completed.")
    lines = [f"{run.field('status')}: {run.name}: {why}" for run, why in failures(report.runs)]
    for line in several(lines, 20):
        console.print(Text(line))
