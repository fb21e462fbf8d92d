"""The two figures: rates per group with every seed, and the loss with the vector on and off over the steps."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secvec.errors import ConfigError
from secvec.report.groups import Comparison, Group, compare
from secvec.report.metrics import METRICS
from secvec.report.records import Curves, Run
from secvec.report.style import BASE, INK, MUTED, SERIES, SURFACE, save, series_color, settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADLINE = ("behavior_rate", "task_accuracy", "desired_rate")
KINDS = {"undesired": SERIES[0], "benign": SERIES[1]}
GroupCurves = Mapping[int, Sequence[Curves]]  # index of a group -> the curves of its runs


def headline_names(comparison: Comparison) -> list[str]:
    """The behavior rate, and what of `HEADLINE` was measured of what the data should teach."""
    columns = (*comparison.bases, *comparison.groups)
    return [n for n in HEADLINE if n == "behavior_rate" or any(column.estimate(n) for column in columns)]


def headline_figure(comparison: Comparison, names: Sequence[str] | None = None) -> Figure:
    """Mean, 95 % interval and each seed per column; one panel for each metric in `names` (None: `headline_names`)."""
    from matplotlib.figure import Figure

    names = headline_names(comparison) if names is None else names
    rows = [*comparison.bases, *comparison.groups]
    colors = [BASE] * len(comparison.bases) + [series_color(i) for i in range(len(comparison.groups))]
    with settings():
        figure = Figure(figsize=(4.9 * len(names), 0.9 + 0.62 * max(len(rows), 1)), layout="constrained")
        engine = figure.get_layout_engine()
        assert engine is not None
        engine.set(wspace=0.08)  # type: ignore[call-arg]
        axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, names, strict=True):
            _rates(axis, rows, colors, name)
    return figure


def _rates(axis: Axes, rows: Sequence[Group], colors: Sequence[str], name: str) -> None:
    metric = METRICS[name]
    better = {"low": "lower is better", "high": "higher is better"}.get(metric.better or "", "")
    axis.set_title(metric.label)
    axis.set_title(f"{metric.arrow} {better}", loc="right", fontsize=9.5, color=MUTED, fontweight="normal")
    axis.set_xlim(-0.03, 1.03)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_yticks(range(len(rows)), [textwrap.fill(group.label, 20) for group in rows])
    axis.tick_params(length=0)
    axis.grid(axis="x")
    axis.spines[["left", "bottom"]].set_visible(False)
    for y, (group, color) in enumerate(zip(rows, colors, strict=True)):
        found = group.estimate(name)
        if found is None:
            axis.text(0.0, y, "not measured", color=MUTED, va="center", fontsize=9.5)
            continue
        if group.phase == "base" and sum(row.phase == "base" for row in rows) == 1:
            axis.axvline(found.mean, color=BASE, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        if found.kind != "none":
            axis.plot([found.low, found.high], [y, y], color=color, linewidth=2.2, solid_capstyle="butt", zorder=2)
            for end in (found.low, found.high):
                axis.plot([end, end], [y - 0.1, y + 0.1], color=color, linewidth=2.2, zorder=2)
        axis.scatter([found.mean], [y], s=78, color=color, edgecolor=SURFACE, linewidth=1.2, zorder=4)
        seeds = [value for _, value in found.by_seed]
        axis.scatter(seeds, [y + 0.27] * len(seeds), s=20, color=color, alpha=0.75, linewidth=0, zorder=3)
        # Kept inside the panel at both ends of the scale.
        side = "left" if found.mean < 0.1 else "right" if found.mean > 0.94 else "center"
        shift = {"left": 0.012, "right": -0.012}.get(side, 0.0)
        axis.text(found.mean + shift, y - 0.2, metric.text(found.mean), color=INK, ha=side,
                  va="bottom", fontsize=9.5)  # fmt: skip


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


def save_headline(records_or_groups: Comparison | Iterable[Run | Mapping[str, Any]], path: Path) -> None:
    """Write figure 1 (behavior rate, and what the data should teach) to `path`, a .svg or .png file."""
    given = records_or_groups
    comparison = given if isinstance(given, Comparison) else compare(given)
    save(headline_figure(comparison), _figure_path(path))


def save_losses(groups: Sequence[Group], curves: GroupCurves, path: Path) -> None:
    """Write figure 2 (loss with the vector on and off) to `path`, a .svg or .png file."""
    indices = [i for i in range(len(groups)) if curves.get(i)]
    if indices:
        save(loss_figure(groups, curves, indices), _figure_path(path))


def _figure_path(path: Path) -> Path:
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"{path}: a figure is written as .svg or .png, not {path.suffix or 'without a suffix'}")
    return path
