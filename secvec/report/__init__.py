"""Reports over run folders: tables with intervals over seeds, figures, answers side by side. Needs no torch."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["write_report"]


def write_report(dirs: Sequence[Path]) -> Path:
    """Write report.html, report.md and report.json into `dirs[0]` from all runs under `dirs`; path of the page."""
    from secvec.report.render import read, write

    return write(read([Path(folder) for folder in dirs]))
