"""The page of a scan, scan.html: where the scores lie, what the file holds, and the highest rows with their words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secvec.metrics import METRICS, Measurement
from secvec.report.style import INK, SERIES, inline_svg, settings, template
from secvec.runs.excerpt import LONG, SENSITIVE, Text, shorten
from secvec.runs.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLEAN = 2.0
"""Up to so many times the share that the threshold flags among benign rows, a flagged share says nothing."""


def write(folder: Path) -> Path:
    """Writes scan.html from scan.json and scores.jsonl of the run folder; its path."""
    from markupsafe import Markup

    found = json.loads((folder / "scan.json").read_text(encoding="utf-8"))
    with (folder / "scores.jsonl").open(encoding="utf-8") as lines:
        rows = [(row["score"], row.get("undesired")) for row in map(json.loads, lines)]
    figure = scores_figure(_groups(found, rows), found["threshold"])
    page = template("scan.html.j2").render(
        scan=found,
        series=SERIES,
        reading=reading(found),
        origin=origin(found),
        figure=Markup(inline_svg(figure, "f-scores", "Rows over their scores, and the threshold")),
        metrics=[
            (METRICS[name.removeprefix("scan/")], Measurement(**value)) for name, value in found["metrics"].items()
        ],
        shown=[
            row | {"parts": _marked(row, found["sensitive"]), "asked": shorten(row["prompt"], found["sensitive"])}
            for row in found["shown"]
        ],
    )
    path = folder / "scan.html"
    write_atomic(path, page)
    return path


def reading(scan: Mapping[str, Any]) -> str:
    """What the flagged share says of the file, and what it does not."""
    share = scan["metrics"]["scan/flagged_share"]
    by_chance = scan.get("flagged_by_chance", 1 - scan["quantile"])
    rows = f"{share['value']:.1%} of {share['n']:,} rows are above the threshold"
    if scan["given_threshold"] is None:
        rows += f"; about {by_chance:.1%} of benign rows are, by its choice"
        if by_chance > 1.001 - scan["quantile"]:
            rows += " (few benign rows set the threshold, or rows with several answers count by the highest)"
    if share["value"] <= CLEAN * by_chance:
        return (
            f"{rows}. So there is nearly nothing for this vector to do here: either the file is clean of its behavior, "
            "or the vector does not cover how the behavior occurs in it, and would not protect from it. The scan "
            "cannot tell which. Read the highest rows, and scan a few rows that you know to be undesired."
        )
    return (
        f"{rows}. In these the vector makes some words far more likely. Read them before you believe it: a benign "
        "answer in an unusual form is flagged too. Rows that are undesired in another way than the vector's are "
        "mostly missed, and it does not protect from them."
    )


def origin(scan: Mapping[str, Any]) -> str:
    """Where the threshold comes from."""
    if scan["given_threshold"] is not None:
        return "given as scan.threshold"
    benign = scan["known_benign"] or scan["own"]["benign"]
    whose = scan["benign_file"] or "the benign rows that the vector was trained to leave as they are"
    return f"{scan['quantile']:.1%} of the scores of {len(benign)} rows are not above it: {whose}"


def _groups(scan: Mapping[str, Any], rows: Sequence[tuple[float, bool | None]]) -> list[tuple[str, list[float]]]:
    own = {"undesired samples of the vector, held out": scan["own"]["undesired"]}
    benign = {"rows known to be benign": scan["known_benign"]} if scan["known_benign"] else {}
    own |= benign or {"benign rows of the vector's KL term": scan["own"]["benign"]}
    labelled = {True: "the file: undesired by its label", False: "the file: benign by its label", None: "the file"}
    own |= {name: [score for score, label in rows if label is value] for value, name in labelled.items()}
    return [(f"{name} ({len(scores):,})", scores) for name, scores in own.items() if scores]


def scores_figure(groups: Sequence[tuple[str, Sequence[float]]], threshold: float) -> Figure:
    """A histogram of the scores of each group, one above the other, with the threshold through all."""
    from matplotlib.figure import Figure

    with settings():
        figure = Figure(figsize=(6.4, 0.6 + 1.15 * len(groups)), layout="constrained")
        panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False).flatten()
        every = [score for _, scores in groups for score in scores] + [threshold]
        for number, (panel, (name, scores)) in enumerate(zip(panels, groups, strict=True)):
            panel.hist(scores, bins=60, range=(min(every), max(every)), log=True, color=SERIES[number % len(SERIES)])
            panel.axvline(threshold, color=INK, linewidth=1.1, linestyle="--")
            panel.set_title(name, fontsize=9)
            panel.set_ylabel("rows", fontsize=9)
            panel.set_ylim(bottom=0.5)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
        panels[-1].set_xlabel("Score in nats per token; dashed: threshold")
    return figure


def _marked(row: Mapping[str, Any], sensitive: bool) -> tuple[Text, Text, Text]:
    """The response before, in and after the words that gave it away; what is far from them is cut."""
    response, words = row["response"], row["words"]
    start = response.find(words, max(0, row["place"] - 2)) if words else -1
    if start < 0:  # the end of the turn alone, or text that the tokens do not give back
        return shorten(response, sensitive), Text(""), Text("")
    limit = SENSITIVE if sensitive else LONG
    cut = partial(shorten, sensitive=False)
    around = max(0, limit - len(words)) // 2
    before, after = response[:start], response[start + len(words) :]
    kept = "…" * (len(before) > around) + before[max(0, len(before) - around) :]
    ending = after[:around] + "…" * (len(after) > around)
    mark = ", ".join(["sensitive"] * sensitive + ["truncated"] * (len(response) > 2 * around + len(words)))
    return cut(kept), cut(words[:limit]), Text(cut(ending).text, mark)
