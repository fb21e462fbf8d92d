"""Every run as a line of CSV, and the tables as files: CSV, LaTeX (booktabs) and Markdown."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from secvec.report import markdown
from secvec.report.groups import Comparison, plain
from secvec.report.records import RecordedRun
from secvec.report.tables import Cell, Table, folder_of
from secvec.runs.files import write_atomic

_ESCAPED = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "→": r"$\rightarrow$",
        "×": r"$\times$",
        "†": r"$^\dagger$",
        "·": r"$\cdot$",
        "÷": r"$\div$",
        "–": "--",
        "…": r"\ldots{}",
        "<": r"$<$",
        ">": r"$>$",
        "|": r"$|$",
    }
)


def runs_csv(runs: Sequence[RecordedRun], comparison: Comparison, root: Path) -> str:
    """All runs, one line each: what they are, the settings that vary, every metric with its interval and n."""
    names = sorted({name for run in runs for name in run.record.metrics})
    values = {id(run): group.values for group in comparison.groups for run in group.runs}
    about = ("status", "stage", "defense", "behavior", "model", "tune", "seed", "commit", "dirty", "created", "error")
    keys = [(index, key) for index, key in enumerate(comparison.keys) if key not in about]
    head = ["run", "folder", *about, *(key for _, key in keys)]
    head += [f"{name}{part}" for name in names for part in ("", " low", " high", " n")]
    lines: list[list[object]] = [list(head)]
    for run in runs:
        mine = values.get(id(run))
        line: list[object] = [run.name, folder_of(run, root), *(getattr(run.record, name) for name in about)]
        line += [plain(mine[index]) if mine and mine[index] else "" for index, _ in keys]
        for name in names:
            found = run.measurement(name)
            n = found.n if found and found.over_prompts else None
            line += [found.value, found.ci_low, found.ci_high, n] if found else [None] * 4
        lines.append(line)  # None is an empty cell
    return _csv(lines)


def save_tables(tables: Mapping[str, Table], folder: Path) -> list[Path]:
    """Write each table, by the name of its file, in the three forms; the paths."""
    written = []
    for name, table in tables.items():
        texts = {".csv": tidy(table), ".tex": latex(table), ".md": "\n".join(markdown.table(table))}
        for suffix, text in texts.items():
            path = folder / f"{name}{suffix}"
            path.unlink(missing_ok=True)
            if table.sections:  # an empty one is no table; one of an earlier report is not left to be taken for it
                write_atomic(path, text)
                written.append(path)
    return written


def tidy(table: Table) -> str:
    """One line for each cell, as programs for statistics like it; values are rounded as shown (report.csv: in full)."""
    lines = [["section", "row", "column", "value", "low", "high", "count", "interval_over", "mark"]]
    for title, rows in table.sections:
        for row in rows:
            for column, c in zip(table.columns, row.cells, strict=True):
                low, _, high = c.interval.strip("[]").partition(", ")
                over = ("prompts" if c.own else c.over) if c.interval else ""
                mark = ", ".join(filter(None, ["best" * c.best, c.mark]))
                lines.append([title, row.title, column, c.value, low, high, c.count, over, mark])
    return _csv(lines)


def _csv(lines: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def latex(table: Table) -> str:
    """A `table` environment with booktabs rules; needs \\usepackage{booktabs} and nothing else."""
    lines = ["% needs \\usepackage{booktabs}", "\\begin{table}", f"\\caption{{{tex(table.caption or table.title)}}}"]
    lines += [f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}", "\\toprule", _line([table.corner, *table.columns])]
    for section, rows in table.sections:
        lines.append("\\midrule")
        lines += [f"\\multicolumn{{{len(table.columns) + 1}}}{{l}}{{\\textit{{{tex(section)}}}}} \\\\"] * bool(section)
        lines += [_line([row.title], map(_cell, row.cells)) for row in rows]
    lines += ["\\bottomrule", "\\end{tabular}"]
    lines += [f"\\par\\footnotesize {tex(markdown.DAGGER)}"] * table.footnote
    return "\n".join([*lines, "\\end{table}", ""])


def _line(texts: Iterable[str], cells: Iterable[str] = ()) -> str:
    return " & ".join([*map(tex, texts), *cells]) + r" \\"


def _cell(c: Cell) -> str:
    # In braces: a row that opened with a bracket would be an argument of the line break before it.
    shown = rf"\textbf{{{tex(c.text)}}}" if c.best else tex(c.text)
    return f"{{{shown}}}" if shown.startswith("[") else shown


def tex(text: str) -> str:
    """Text that LaTeX shows as it is, on one line."""
    return re.sub(r"\s+", " ", text).translate(_ESCAPED)
