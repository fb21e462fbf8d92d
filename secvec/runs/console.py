"""What a person reads while a run goes on: tables as text, in the log and on the screen alike."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ARROWS = {
    "behavior_rate": "↓",
    "behavior_rate_plus": "↓",
    "behavior_score": "↓",
    "harmfulness_score": "↓",
    "leak_rate": "↓",
    "refusal_rate": "↑",
    "wanted_rate": "↑",
    "over_refusal_rate": "↓",
    "unparsable_rate": "↓",
    "task_accuracy": "↑",
    "retained_accuracy": "↑",
    "coherence_rate": "↑",
    "kl_to_base": "→0",
    "perplexity": "↓",
    "answer_perplexity": "↓",
}


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


def metrics_table(title: str, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per metric: value, 95 % interval, n."""
    rows = []
    for name, m in metrics.items():
        arrow = ARROWS.get(name.rsplit("/", 1)[-1], "")
        interval = f"[{m['ci_low']:.3f}, {m['ci_high']:.3f}]" if m.get("ci_low") is not None else ""
        rows.append([f"{name} {arrow}".strip(), f"{m['value']:.3f}", interval, str(m["n"])])
    return table(title, ["metric", "value", "95 % interval", "n"], rows)
