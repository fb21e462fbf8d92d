"""The loss with the vector on and off over the steps of fine-tuning."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from secvec.report.groups import Group
from secvec.report.records import Curves
from secvec.report.style import MUTED, SERIES, settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"undesired": SERIES[0], "benign": SERIES[1]}
GroupCurves = Mapping[int, Sequence[Curves]]  # index of a group -> the curves of its runs


def loss_figure(groups: Sequence[Group], curves: GroupCurves, indices: Sequence[int]) -> Figure:
    """Loss in nats/token (log) over fine-tuning steps, one panel for each group in `indices`, all on one scale."""
    from matplotlib.figure import Figure

    losses = [v for runs in curves.values() for c in runs for m in c if "/loss_" in m for v in c[m].values() if v > 0]
    top, bottom = max(losses, default=1.0), max(min(losses, default=0.1), 1e-5)
    with settings():
        # Fixed margins, not a computed layout: panels stay equally high whether their legend has one line or two.
        figure = Figure(figsize=(4.9 * len(indices), 3.6))
        axes = figure.subplots(1, len(indices), sharey=True, squeeze=False)[0]
        figure.subplots_adjust(0.6 / figure.get_figwidth(), 0.27, 1 - 0.1 / figure.get_figwidth(), 0.91, wspace=0.1)
        for axis, index in zip(axes, indices, strict=True):
            axis.set_title(textwrap.fill(groups[index].label, 44))
            # What matters are the small losses: with the vector on, a hundredth of the benign data's at the start.
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.minorticks_off()
            axis.set_ylim(bottom / 1.5, top * 1.5)
            axis.set_xlabel("fine-tuning step")
            axis.tick_params(length=0, labelcolor=MUTED)
            axis.grid(axis="y")
            axis.spines["left"].set_visible(False)
            _losses(axis, curves.get(index, ()))
            handles, labels = axis.get_legend_handles_labels()
            if handles:
                axis.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.46, -0.18), ncols=2, fontsize=9.5,
                            handlelength=2.6, columnspacing=1.4)  # fmt: skip
        axes[0].set_ylabel("loss, nats per token")
    return figure


def _losses(axis: Axes, runs: Sequence[Curves]) -> None:
    drawn = False
    for kind, color in KINDS.items():
        on, off = f"{kind}/loss_on", f"{kind}/loss_off"
        with_vector = [run for run in runs if run.get(on) and run[on] != run.get(off)]
        for metric, of, style in ((on, with_vector, "-"), (off, runs, (0, (4, 2)))):
            lines = [run[metric] for run in of if run.get(metric)]
            if metric == off and not lines:
                continue
            name = f"{kind}, vector {'on' if metric == on else 'off'}" if with_vector else f"{kind}, no vector"
            if lines:
                drawn = True
                _curve(axis, lines, color, "-" if not with_vector else style, name)
    if not drawn:
        axis.text(0.5, 0.5, "no telemetry recorded", transform=axis.transAxes, ha="center", color=MUTED)


def _curve(axis: Axes, lines: Sequence[Mapping[int, float]], color: str, style: Any, name: str) -> None:
    """Thin: each seed. Thick: the mean at the steps that all seeds have."""
    if len(lines) > 1:
        for line in lines:
            axis.plot(sorted(line), [line[s] for s in sorted(line)], color=color, linewidth=0.8, alpha=0.4)
    shared = sorted(set.intersection(*(set(line) for line in lines)))
    mean = [sum(line[step] for line in lines) / len(lines) for step in shared]
    axis.plot(shared, mean, color=color, linewidth=2.1, linestyle=style, label=name,
              marker="o" if len(shared) == 1 else None)  # fmt: skip
