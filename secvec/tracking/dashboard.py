"""The paper's plots as a W&B workspace and report: `python -m secvec.tracking.dashboard ENTITY/PROJECT [--print]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from secvec.errors import ConfigError, SecVecError
from secvec.metrics import METRICS, qualified

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace

NAME = "Security vectors"
HARM, SKILL = qualified("after", "behavior_rate"), qualified("after", "task_accuracy")
BARS = (HARM, qualified("after", "refusal_rate"), SKILL, qualified("after", "retained_accuracy"))
CURVES = {
    "Undesired data: loss with the vector on and off": ("undesired/loss_on", "undesired/loss_off"),
    "Benign data: loss with the vector on and off": ("benign/loss_on", "benign/loss_off"),
    "Suppression ratio: gradient on undesired data, vector on ÷ off": ("undesired/suppression_ratio",),
    "Drift of the backbone": ("drift",),
}
SETTINGS = ("defense.name", "vector.r", "vector.lr", "optimizer.lr", "data.num_harmful", "seed")
TABLES = ("outcomes", "predictions")


def panels() -> dict[str, list[Any]]:
    """Panels by section."""
    import wandb_workspaces.reports.v2 as wr

    def summary(name: str) -> Any:
        return wr.SummaryMetric(name)

    by = wr.Config("defense.name")
    bars = [
        wr.BarPlot(
            title=f"{_label(name)} by defense",
            metrics=[name],
            groupby=by,
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            range_x=(0, 1),
        )
        for name in BARS
    ]
    scatter = wr.ScatterPlot(title="Behavior against new skill", x=summary(SKILL), y=summary(HARM))
    lines = [
        wr.LinePlot(title=title, x="finetune/step", y=[f"finetune/telemetry/{name}" for name in names])
        for title, names in CURVES.items()
    ]
    during: list[Any] = [f"finetune/during/{name}" for name in ("behavior_rate", "task_accuracy")]
    lines.append(wr.LinePlot(title="Behavior and new skill during the fine-tune", x="finetune/step", y=during))
    lines += [
        wr.LinePlot(title=f"Training loss: {stage}", x=f"{stage}/step", y=[f"{stage}/train/loss"])
        for stage in ("vector", "finetune")
    ]
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(name), log=name.endswith("lr")) for name in SETTINGS]
    columns += [wr.ParallelCoordinatesPlotColumn(metric=summary(name)) for name in (SKILL, HARM)]
    return {
        "Result": [scatter, *bars],
        "Mechanism": lines,
        "What it depends on": [wr.ParallelCoordinatesPlot(title="Settings and result", columns=columns)],
        "Tables": [wr.WeavePanelSummaryTable(table_name=name) for name in TABLES],
    }


def workspace(entity: str, project: str) -> Workspace:
    """A view of the project that can be saved, its runs grouped by sweep and defense."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=name, panels=found, is_open=True) for name, found in panels().items()]
    columns = ["run:displayName", "run:state", "config:defense.value.name", f"summary:{HARM}", f"summary:{SKILL}"]
    grouped = ws.RunsetSettings(groupby=[expr.Metric("Group"), expr.Config("defense.name")], pinned_columns=columns)
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=sections, runset_settings=grouped)


def report(entity: str, project: str) -> Report:
    """A report with the same panels and what each metric means."""
    import wandb_workspaces.reports.v2 as wr

    meanings = [f"- **{METRICS[n].label}** {METRICS[n].arrow}: {METRICS[n].about}" for n in METRICS]
    blocks: list[Any] = [wr.MarkdownBlock(text="\n".join(["Vector off, unless a name says otherwise.", *meanings]))]
    for title, found in panels().items():
        runs = wr.Runset(groupby=["config.defense.name"])  # of the report's project; naming it asks the server
        blocks += [wr.H2(text=title), wr.PanelGrid(runsets=[runs], panels=found)]
    return wr.Report(entity=entity, project=project, title=NAME, blocks=blocks, width="fluid")


def as_json(entity: str, project: str) -> str:
    """Both as W&B stores them."""
    models = {"workspace": workspace(entity, project)._to_model(), "report": report(entity, project)._to_model()}
    return json.dumps({k: m.model_dump(mode="json", by_alias=True, exclude_none=True) for k, m in models.items()})


def save(entity: str, project: str) -> list[str]:
    """Saves workspace and report, and returns their addresses. Raises ConfigError without an account."""
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            "saving a dashboard needs a Weights & Biases account: run `wandb login` or set WANDB_API_KEY; "
            "--print shows it without one"
        )
    return [workspace(entity, project).save().url, report(entity, project).save().url]


def main(argv: Sequence[str] | None = None) -> int:
    """Saves workspace and report, or prints them. Returns 0, or 2 after a message for the user."""
    about = "Make the W&B workspace and report with the paper's plots."
    parser = argparse.ArgumentParser(prog="python -m secvec.tracking.dashboard", description=about)
    where = "where the runs are: logger.wandb.entity/logger.wandb.project"
    parser.add_argument("project", metavar="ENTITY/PROJECT", help=where)
    parser.add_argument("--print", action="store_true", help="print both as JSON and save nothing; needs no account")
    given = parser.parse_args(argv)
    entity, _, project = given.project.partition("/")
    try:
        if not entity or not project or "/" in project:
            raise ConfigError(f"got {given.project!r}; expected ENTITY/PROJECT, as in myteam/secvec")
        for line in [as_json(entity, project)] if given.print else save(entity, project):
            print(line)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: pip install 'secvec[dashboard]'", file=sys.stderr)
        return 2
    except SecVecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _label(name: str) -> str:
    return METRICS[name.rpartition("/")[2]].label


if __name__ == "__main__":
    sys.exit(main())
