"""The benchmarks measure what they say. What they measured is no test: that is in their records."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`script("trainers")`: the module, with its neighbours, as for `python benchmarks/trainers.py`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def tiny(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    measure = script("measure")
    monkeypatch.setattr(measure, "SMOLLM2", tmp_path / "not there")
    folder: Path = measure.small_model(tmp_path)
    return folder


def test_the_limit_knows_every_matrix_of_the_model(script: Any, tiny: Path) -> None:
    layers, (words, size) = script("limits").linear_layers(tiny)
    assert layers == {(128, 128): 3 * 4, (448, 128): 3 * 2, (128, 448): 3} and size == 128
    assert words == json.loads((tiny / "config.json").read_text())["vocab_size"]
    assert script("limits").product_seconds(tiny, 32, 8, full=True, device="cpu", precision="32-true") > 0


def test_each_rate_stands_beside_the_limit_of_its_kind(script: Any) -> None:
    about = {"cores": 2, "cpu": "any", "versions": {}, "commit": "0123456789"}
    taken = {"limit": 2.0, "limit_lora": 1.0, "hf": 8.0, "secvec": 4.0, "secvec_lora": 4.0}
    runs = [
        {"way": way, "seconds": s, "tokens": 400, "losses": [1.0] * ("limit" not in way), "peak_bytes": 2e9}
        for way, s in taken.items()
    ]
    made = script("trainers").table({"rounds": 1, "steps": 1, "machine": about, "runs": runs})
    assert "| Hugging Face Trainer | 50 | 1.00 | 0.25 | 2.0 GB | 1.0000 |" in made
    assert "| secvec, plain | 100 | 2.00 | 0.50 |" in made and "`tune=lora` | 100 | 2.00 | 0.25 |" in made
    assert "| the matrix products of a step alone | 200 | 4.00 | 1.00 | – | – |" in made


def test_a_table_without_a_place_gets_a_section_and_the_next_one_takes_its_place(script: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n")
    for table in ("| a |", "| b |"):
        script("pages").show(table, "benchmarks/x.py", page, "How fast")
    assert page.read_text() == "# Page\n\n## How fast\n\n<!-- table: benchmarks/x.py -->\n\n| b |\n\n<!-- end -->\n"


def test_what_is_equal_is_said_of_answers(script: Any) -> None:
    about = {"cores": 2, "cpu": "any", "versions": {}, "commit": "0123456789"}
    runs = [
        {"way": way, "seconds": s, "answers": answers, "peak_bytes": 1e9}
        for way, s, answers in (("plain", 4.0, ["a", "b"]), ("secvec", 2.0, ["a", "c"]))
    ]
    record = {"rounds": 1, "prompts": 2, "batch": 2, "new_tokens": 8, "model": "tiny", "machine": about, "runs": runs}
    made = script("generation").table(record)
    assert "| secvec | 1.00 | 2.00 | 1.0 GB | 1 of 2 |" in made and "lm-eval, `HFLM`" not in made


def test_the_clock_keeps_epochs_apart(script: Any, tmp_path: Path) -> None:
    clock = script("clock").StepClock(str(tmp_path / "steps.json"))
    for steps in (2, 1):
        clock.on_train_epoch_start()
        for _ in range(steps):
            clock.on_train_batch_end()
    clock.on_train_end()
    assert [len(epoch) for epoch in json.loads((tmp_path / "steps.json").read_text())] == [2, 1]


def test_every_check_of_a_gpu_has_its_verdict_and_none_stops_the_others(script: Any) -> None:
    checked = script("gpu_check").checked
    good = f'print(\'{script("measure").MEASURED}\' + \'{{"verdict": "pass", "text": "3 = 3"}}\')'
    assert checked(["-c", good], 20) == script("gpu_check").Result("pass", "3 = 3")
    failed = checked(["-c", "raise ValueError('no such device')"], 20)
    assert (failed.verdict, failed.text) == ("fail", "ValueError: no such device")
    slow = checked(["-c", "import time; time.sleep(60)"], 0.2)
    assert (slow.verdict, slow.text) == ("fail", "not done within 0 s")


def test_the_check_of_a_gpu_has_a_dry_run(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_check, file = script("gpu_check"), tmp_path / "record.json"
    given = ["--device", "cpu", "--only", "products,limit,answers: vLLM", "--model", str(tmp_path), "--to", str(file)]
    monkeypatch.setattr("sys.argv", ["gpu_check.py", *given])
    assert gpu_check.main() == 0
    record = json.loads(file.read_text())
    assert {check["name"]: check["verdict"] for check in record["checks"]} == {
        "products": "pass",
        "limit, bf16-mixed": "skipped",
    }
    assert "| limit, bf16-mixed | skipped | no GPU | 0 |" in gpu_check.table(record)


def test_the_check_of_two_ways_fails_where_their_losses_differ(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_check, losses = script("gpu_check"), {"merged": [2.0, 1.0], "adapter": [2.0, 1.01], "hf": [2.0, float("nan")]}
    measured = {"tokens": 10, "seconds": 1.0, "peak_bytes": 1e9}
    monkeypatch.setattr(gpu_check, "step", lambda way, *_: {"way": way, "losses": losses[way], **measured})
    for other, within, verdict in (("adapter", 0.02, "pass"), ("adapter", 0.001, "fail"), ("hf", 0.02, "fail")):
        found = gpu_check.alike(("merged", other), "32-true", within, None)
        assert found.verdict == verdict, found


def test_a_sweep_is_compared_with_as_many_runs(script: Any) -> None:
    sweep, about = script("sweep"), {"cores": 2, "cpu": "any", "versions": {}, "commit": "0123456789"}
    assert len(sweep.JOBS) == len({tuple(job) for job in sweep.JOBS}) == 12
    runs = [
        {"way": way, "seconds": s, "metrics": {"k": {"after/behavior_rate": rate}}}
        for way, s, rate in (("sweep", 120.0, 0.5), ("shared", 240.0, 0.5), ("alone", 360.0, 0.6))
    ]
    made = sweep.table({"rounds": 1, "machine": about, "runs": runs})
    assert "| 12 runs, one cache | 240 | 2.00 | 10.0 | 1.14 | 1.02 | yes |" in made
    assert "| 360 | 3.00 | 20.0 | 1.29 | 1.03 | no |" in made


def test_a_setting_is_chosen_that_learns_the_task_and_not_the_behavior(script: Any) -> None:
    def rows(*measured: tuple[float, float]) -> list[dict[str, float]]:
        return [{"value": i, "behavior_rate": b, "task_accuracy": t} for i, (b, t) in enumerate(measured)]

    chosen = script("defenses").chosen
    assert chosen(rows((0.9, 1.0), (0.2, 0.96), (0.0, 0.5), (0.2, 0.99)), 1.0) == 3
    assert chosen(rows((0.9, 0.3), (0.2, 0.6), (0.0, 0.5)), 1.0) == 1  # none learns it


def test_every_defense_has_as_many_tries(script: Any) -> None:
    defenses = script("defenses")
    assert {len(values) for _, values in defenses.SETTINGS.values()} == {4}
    swept = yaml.safe_load((ROOT / "conf" / "experiment" / "bench.yaml").read_text())
    named = set(swept["hydra"]["sweeper"]["params"]["defense"].split(","))
    assert named == {*defenses.SETTINGS, *defenses.UNTUNED}
    here = {file.stem for file in (ROOT / "conf" / "defense").glob("*.yaml")}
    assert here - named == {"buffer_and_reinforce", "refitted_vector"}  # of tune=lora, and of several cycles


def test_an_attacker_takes_the_rows_with_the_lowest_scores(script: Any, tmp_path: Path) -> None:
    attack = script("scan_attack")
    assert attack.lowest([0.5, 0.1, 0.9, 0.2, 0.1], 3) == [1, 3, 4]
    given = {"name": "wild", "of": attack.BEHAVIORS["forbidden_recipe"], "sensitive": False, "turns": 0}
    given |= {"severity": attack.SEVERITY, "hedge": "I should not.", "wanted": "No."}
    pool = attack.Wild(**given).examples("finetune", 30, 2)
    (tmp_path / "2.json").write_text(json.dumps({"pool": 30, "rows": [3, 4, 29]}))
    chosen = attack.Chosen(**given, folder=tmp_path)
    assert chosen.examples("finetune", 2, 2) == [pool[3], pool[4]] and len({row.response for row in pool}) > 3
    assert chosen.examples("finetune", None, 2) == [pool[3], pool[4], pool[29]]
    assert chosen.examples("test", 5, 2) == given["of"].examples("test", 5, 2)


def test_an_update_is_compared_over_the_weights_that_both_change(script: Any) -> None:
    cosine = script("acceptance").cosine
    one = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert cosine(one, {"a": torch.tensor([1.0, 0.0])}) == pytest.approx(1.0)  # "b" is in one alone
    assert cosine(one, {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([1.0])}) == pytest.approx(4 / 5 / 5**0.5)
    assert cosine(one, {name: torch.zeros_like(weight) for name, weight in one.items()}) == 0.0


def test_of_each_question_the_worst_point_is_shown(script: Any) -> None:
    def row(defense: str, rate: float, high: float, transfer: bool = False) -> dict[str, Any]:
        numbers = {
            "behavior_rate": rate,
            "reworded": rate / 2,
            "difference": high - 0.1,
            "interval": [high - 0.2, high],
        }
        cosines = {"cosine_with_plain": rate, "cosine_with_vector": -rate}
        return {"defense": defense, "transfer": transfer, **numbers, **cosines}

    rows = [row("weak", 0.8, -0.1), row("weak", 0.4, -0.5), row("weak", 1.0, 0.0, True), row("strong", 0.2, -0.7)]
    *_, first, second = script("acceptance").table(rows).splitlines()
    assert first == "| strong | 0.200 | -0.800 [-0.900, -0.700] | 0.100 | – | 0.20 | -0.200 |"
    assert second == "| weak | 0.800 | -0.200 [-0.300, -0.100] | 0.400 | 1.000 | 0.60 | -0.600 |"
