"""Curves over the steps of fine-tuning: losses with the vector on and off, behavior and task with it off."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from secvec.metrics import METRICS, RATE
from secvec.report.groups import Group
from secvec.report.records import Curves
from secvec.report.style import MUTED, SERIES, Look, settings

KINDS = {"undesired": SERIES[0], "benign": SERIES[1]}
GroupCurves = Mapping[int, Sequence[Curves]]
"""Index of a group -> the curves of its runs."""


def groups_with(curves: GroupCurves, prefix: str) -> list[int]:
    """The groups that have a curve whose name begins with `prefix`."""
    return [index for index, runs in curves.items() if any(name.startswith(prefix) for run in runs for name in run)]


def loss_figure(groups: Sequence[Group], curves: GroupCurves, indices: Sequence[int]) -> Figure:
    """Loss in nats/token (log), one panel for each group in `indices`, all on one scale."""
    losses = [v for runs in curves.values() for c in runs for m in c if "/loss_" in m for v in c[m].values() if v > 0]
    top, bottom = max(losses, default=1.0), max(min(losses, default=0.1), 1e-5)
    with settings():
        figure, axes = _panels([groups[index] for index in indices], "loss, nats per token")
        for axis, index in zip(axes, indices, strict=True):
            # What matters are the small losses: with the vector on, a hundredth of the benign data's at the start.
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.minorticks_off()
            axis.set_ylim(bottom / 1.5, top * 1.5)
            _losses(axis, curves[index], _benign_name(groups[index]))
            _legend(axis)
    return figure


def _benign_name(group: Group) -> str:
    """What the telemetry calls benign; nobody knows it of untrusted data."""
    counts = group.runs[0].record.data.counts.get("finetune", {})
    return "untrusted" if "untrusted" in counts else "benign"


def rates_figure(groups: Sequence[Group], curves: GroupCurves, indices: Sequence[int]) -> Figure:
    """Every rate that was measured during fine-tuning, one panel for each group in `indices`."""
    rates = [name for name, metric in METRICS.items() if metric.bounds == RATE]
    measured = [name for name in rates if groups_with(curves, f"during/{name}")]
    with settings():
        figure, axes = _panels([groups[index] for index in indices], "share of prompts")
        for axis, index in zip(axes, indices, strict=True):
            axis.set_ylim(-0.04, 1.04)
            for number, name in enumerate(measured):
                lines = [run[f"during/{name}"] for run in curves[index] if f"during/{name}" in run]
                if lines:
                    _curve(axis, lines, SERIES[number], "-", METRICS[name].title)
            _legend(axis)
    return figure


def _panels(groups: Sequence[Group], label: str) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each group; `label` names what is on the y axis."""
    # Fixed margins, not a computed layout: panels stay equally high whether their legend has one line or two.
    figure = Figure(figsize=(4.9 * len(groups), 3.6))
    axes = list(figure.subplots(1, len(groups), sharey=True, squeeze=False)[0])
    figure.subplots_adjust(0.6 / figure.get_figwidth(), 0.27, 1 - 0.1 / figure.get_figwidth(), 0.91, wspace=0.1)
    axes[0].set_ylabel(label)
    for axis, group in zip(axes, groups, strict=True):
        axis.set_title(textwrap.fill(group.label, 44))
        axis.set_xlabel("fine-tuning step")
        axis.tick_params(labelcolor=MUTED)
        axis.grid(axis="y")
        axis.spines["left"].set_visible(False)
    return figure, axes


def _losses(axis: Axes, runs: Sequence[Curves], benign: str) -> None:
    for kind, color in KINDS.items():
        shown = benign if kind == "benign" else kind
        on, off = f"telemetry/{kind}/loss_on", f"telemetry/{kind}/loss_off"
        with_vector = [run for run in runs if run.get(on) and run[on] != run.get(off)]
        if lines := [run[on] for run in with_vector]:
            _curve(axis, lines, color, "-", f"{shown}, vector on")
        if lines := [run[off] for run in runs if run.get(off)]:
            name, style = ("vector off", (0, (4, 2))) if with_vector else ("no vector", "-")
            _curve(axis, lines, color, style, f"{shown}, {name}")


def _curve(axis: Axes, lines: Sequence[Mapping[int, float]], color: str, style: Any, name: str) -> None:
    """Thin: each seed. Thick: the mean at the steps that all seeds have."""
    if len(lines) > 1:
        for line in lines:
            axis.plot(sorted(line), [line[s] for s in sorted(line)], color=color, linewidth=0.8, alpha=0.4)
    shared = sorted(set.intersection(*(set(line) for line in lines)))
    mean = [sum(line[step] for line in lines) / len(lines) for step in shared]
    marker = "o" if len(shared) == 1 else None
    axis.plot(shared, mean, color=color, linewidth=2.1, linestyle=style, label=name, marker=marker)


def _legend(axis: Axes) -> None:
    below: Look = {"loc": "upper center", "bbox_to_anchor": (0.46, -0.18)}
    axis.legend(ncols=2, fontsize=9.5, handlelength=2.6, columnspacing=1.4, **below)
