"""Command line: `python -m secvec.report DIR [DIR...] [--to DIR] [--figures DIR] [--tables DIR]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from secvec.errors import SecVecError


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and show its main table; 0, or 2 when the input or the output is at fault."""
    parser = argparse.ArgumentParser(prog="python -m secvec.report", description="Compare finished runs.")
    parser.add_argument(
        "dirs", nargs="+", type=Path, metavar="DIR", help="folder with runs, or with a report.json of them"
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="where the report goes; default: the first folder")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also write the figures there, as .svg and .png")
    parser.add_argument("--tables", type=Path, metavar="DIR", help="also write the tables there: .csv, .tex and .md")
    given = parser.parse_args(argv)
    from secvec.report.render import read, save_figures, save_tables, write

    try:
        report = read(given.dirs, given.to)
        path = write(report)
        drawn = save_figures(report, given.figures) if given.figures else []
        drawn += save_tables(report, given.tables) if given.tables else []
    except SecVecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or given.dirs[0]}: {error.strerror or error}", file=sys.stderr)
        return 2
    from secvec.report.terminal import show

    show(report)
    # Not through rich: it would wrap a long path.
    for written in (*drawn, path):
        print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
