"""How long one waits before anything is computed: `python benchmarks/startup.py [--rounds 5]`.

The commands run one after another in several rounds; what each imports is looked up once more, without a clock. The
record goes into results/performance/, its table into docs/performance.md; `--table` makes the table again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from typing import Any

from measure import PAGE, RESULTS, ROOT, footer, machine, run, spread
from pages import keep, show

RECORDS = RESULTS / "startup.json"
TITLE = "Before anything is computed"
COMMANDS = {
    "python train.py --help": (["train.py", "--help"], 2.0),
    "python train.py --cfg job": (["train.py", "--cfg", "job"], 2.0),
    "python -m secvec.report DIR": (["-m", "secvec.report", ROOT / "results" / "demo", "--to", "{new}"], 3.0),
    'python -c "import secvec"': (["-c", "import secvec"], 0.2),
}
"""Each command with its aim in seconds. The report is that of the demo: tables, figures and a page."""


def measure(name: str) -> float:
    """Seconds of wall time of a command."""
    with tempfile.TemporaryDirectory() as new:
        return run([str(part).format(new=new) for part in COMMANDS[name][0]]).seconds


def imports_torch(name: str) -> bool:
    """Whether a command imports torch."""
    with tempfile.TemporaryDirectory() as new:
        found = run(["-X", "importtime", *(str(part).format(new=new) for part in COMMANDS[name][0])])
    return any(line.endswith("| torch") for line in map(_squeezed, found.out.splitlines()))


def _squeezed(line: str) -> str:
    return " ".join(line.split())


def table(record: Mapping[str, Any]) -> str:
    """Medians over the rounds, with the lowest and the highest."""
    lines = ["| | seconds ↓ | aim | imports torch |", "| --- | --- | --- | --- |"]
    for name, (_, aim) in COMMANDS.items():
        seconds = [one["seconds"] for one in record["runs"] if one["command"] == name]
        torch = "yes" if record["imports_torch"][name] else "no"
        lines.append(f"| `{name}` | {spread(seconds, 2)} | {aim:g} | {torch} |")
    return "\n".join([*lines, "", footer(f"{record['rounds']} rounds, whole processes", record["machine"])])


def main() -> None:
    """Runs all commands and writes the record and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        about, torch = machine(), {name: imports_torch(name) for name in COMMANDS}
        runs = [{"command": name, "seconds": measure(name)} for _ in range(given.rounds) for name in COMMANDS]
        keep({"rounds": given.rounds, "machine": about, "imports_torch": torch, "runs": runs}, RECORDS)
    show(table(json.loads(RECORDS.read_text(encoding="utf-8"))), __file__, PAGE, TITLE)


if __name__ == "__main__":
    main()
