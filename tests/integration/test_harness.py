"""lm-evaluation-harness on a saved backbone, with a local task and no network."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from commands import run_command

from secvec.data.embedded import Ordinary
from secvec.models.tiny import build_tiny

TASK = """task: colours
dataset_path: json
dataset_kwargs:
  data_files: {test: DATA}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["green", "moo"]
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval")
    texts = [text for e in Ordinary().examples("align", 100, 0) for text in (e.prompt, e.response)]
    for part in build_tiny(texts, 0):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    rows = [{"question": f"What is the colour of grass, {i}?", "answer": i % 2} for i in range(6)]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.replace("DATA", str(tmp_path / "rows.json")))
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = [f"model.name_or_path={folder / 'model'}", f"run_dir={folder / 'run'}", f"paths.cache={folder / 'cache'}"]
    return run_command("evaluate.py", *given, "metrics=lm_eval", *arguments, cwd=folder)


def test_a_local_task_is_measured_and_recorded(folder: Path) -> None:
    done = run(folder, "tasks=[colours]", f"task_folder={folder / 'tasks'}")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "run" / "record.json").read_text())["metrics"]
    accuracy = metrics["lm_eval/colours/acc"]
    assert accuracy["n"] == 6 and accuracy["ci_low"] <= accuracy["value"] <= accuracy["ci_high"]
    assert accuracy["value"] == 0.5  # half of the answers are each choice, and the model cannot tell questions apart


def test_an_unknown_task_is_named_with_the_nearest(folder: Path) -> None:
    done = run(folder, "tasks=[colors]", f"task_folder={folder / 'tasks'}")
    assert done.returncode == 2 and "did you mean 'colours'?" in done.stderr and "Traceback" not in done.stderr


def test_metrics_and_tasks_belong_together(folder: Path) -> None:
    done = run(folder)
    assert done.returncode == 2 and "metrics=lm_eval and tasks=[...] belong together" in done.stderr


def test_the_harness_has_one_process(folder: Path) -> None:
    done = run(folder, "tasks=[colours]", f"task_folder={folder / 'tasks'}", "trainer=ddp")
    assert done.returncode == 2 and "metrics=lm_eval runs in one process" in done.stderr
