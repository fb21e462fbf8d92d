"""Tables as plain text, for the log and the screen."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from secvec.metrics import Measurements, metric_of


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table."""
    grid = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(header):
        grid.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        grid.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=110).print(grid)
    return f"{title}\n{out.getvalue().rstrip()}"


def metrics_table(title: str, measurements: Measurements) -> str:
    """One row per metric: value, 95 % interval, n."""
    rows = []
    for name, found in measurements.items():
        metric = metric_of(name)
        interval = "" if found.ci_low is None else f"[{found.ci_low:.3f}, {found.ci_high:.3f}]"
        rows.append([f"{name} {metric.arrow if metric else ''}".strip(), f"{found.value:.3f}", interval, str(found.n)])
    return table(title, ["metric", "value", "95 % interval", "n"], rows)
