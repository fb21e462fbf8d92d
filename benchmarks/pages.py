"""The records of a benchmark and their table, in the page of the docs that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def keep(records: Any, file: Path) -> None:
    """Writes the records of a benchmark."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def show(table: str, script: str, page: Path, title: str = "") -> None:
    """Puts the table in its place on the page, which names the script, and prints it.

    Where there is no place yet, a section with the `title` is added at the end.
    """
    text, place = page.read_text(encoding="utf-8"), f"<!-- table: benchmarks/{Path(script).name} -->\n"
    if title and place not in text:
        text += f"\n## {title}\n\n{place}\n<!-- end -->\n"
    before, start, rest = text.partition(place)
    _, end, after = rest.partition("<!-- end -->")
    assert start and end, f"{page} has no place for the table"
    page.write_text(f"{before}{start}\n{table}\n\n{end}{after}", encoding="utf-8")
    print(table)
