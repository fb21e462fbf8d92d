"""Work that is done is not thrown away by a fault after it, and not done again for what only evaluation reads."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import run_of

from secvec import run as runs
from secvec.cli import _no_room
from secvec.config.schema import RunConfig
from secvec.data.datamodule import SecVecDataModule
from secvec.errors import ArtifactError, ConfigError, DataError
from secvec.module import SecVecModule
from secvec.run import train
from secvec.runs.files import atomic_path
from secvec.stages import finetune
from secvec.training.checkpoints import CheckpointFile
from secvec.training.trainer import Training
from tests.contracts.test_stages import finetuned, same, weights

Make = Callable[..., RunConfig]


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trainings that begin."""
    begun: list[str] = []
    fit = runs.fit
    monkeypatch.setattr(
        runs,
        "fit",
        lambda module, data, training, *rest: begun.append(training.label) or fit(module, data, training, *rest),
    )
    return begun


def kept(folder: Path) -> Training:
    return Training(folder, "finetune", "optimizer.lr", 0, 1, None)  # type: ignore[arg-type]


def test_a_result_that_could_not_be_saved_is_not_trained_again(
    make_config: Make, labels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_config("defense=none", "stage=finetune", run="whole")
    record = train(whole)
    assert not (Path(whole.run_dir) / "checkpoints").exists()
    cut = make_config("defense=none", "stage=finetune", run="cut")
    shutil.rmtree(Path(cut.paths.cache) / "finetuned")

    def full(self: SecVecModule, folder: Path) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(SecVecModule, "save", full)
        train(cut)
    assert [file.name for file in kept(Path(cut.run_dir)).checkpoints.iterdir()] == ["last.ckpt"]

    monkeypatch.setattr(SecVecModule, "training_step", lambda *_: pytest.fail("trained again"))
    again = train(cut)
    assert same(weights(Path(cut.run_dir) / "backbone"), weights(Path(whole.run_dir) / "backbone"))
    assert again["metrics"] == record["metrics"] and "drift" in again["metrics"]
    assert not (Path(cut.run_dir) / "checkpoints").exists()


@pytest.mark.parametrize("stage", ["align", "vector", "finetune-1", "finetune"])
def test_a_run_that_ends_before_its_result_is_in_its_place_trains_nothing_again(
    stage: str, make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Between the end of a training and the moment at which other runs find what it gave."""
    cut = make_config("finetune.cycles=2", f"paths.cache={tmp_path / 'own'}", run="cut")
    steps: dict[str, int] = {}
    step = SecVecModule.training_step

    def counted(self: SecVecModule, *given: Any) -> Any:
        steps[self.trainer.loggers[0].stage] = steps.get(self.trainer.loggers[0].stage, 0) + 1
        return step(self, *given)

    monkeypatch.setattr(SecVecModule, "training_step", counted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("secvec.runs.cache.atomic_path", partial(never_in_its_place, stage))
        patch.setattr("secvec.stages.finetune.write_atomic", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train(cut)
    assert stage in steps
    before, _ = dict(steps), steps.clear()
    train(cut)
    assert not set(steps) & set(before)
    assert not (Path(cut.run_dir) / "checkpoints").exists()
    assert not list(tmp_path.glob("own/models/*.part"))


@contextmanager
def never_in_its_place(stage: str, path: Path) -> Iterator[Path]:
    """`atomic_path`, cut off before the end of a folder that `stage` makes."""
    made = {"align": "models", "vector": "vectors", "finetune-1": "cycles"}.get(stage)
    with atomic_path(path) as out:
        yield out
        if path.parent.name == made:
            raise KeyboardInterrupt


def test_a_damaged_checkpoint_is_not_used(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = make_config("defense=none", "stage=finetune", run="cut")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="cut off"):
        patch.setattr(SecVecModule, "save", lambda *_: (_ for _ in ()).throw(OSError("cut off")))
        train(cut)
    last = kept(Path(cut.run_dir)).begins_at()
    assert last
    content, middle = last.read_bytes(), last.stat().st_size // 2
    for damaged in (
        b"",
        content[:middle],
        content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
    ):
        last.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=rf"{last} is cut short or damaged. Remove the folder {last.parent}"):
            train(cut)


def test_a_disk_that_fills_takes_no_checkpoint_with_it(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are limited in size, which fails as a full disk does: within the write, by one library or the other."""
    whole, cut = (make_config("defense=none", "stage=finetune", run=name) for name in ("whole", "cut"))
    train(whole)
    checkpoints, most = kept(Path(cut.run_dir)).checkpoints, resource.getrlimit(resource.RLIMIT_FSIZE)
    write = CheckpointFile.save_checkpoint
    full = [1, 2]
    """The number of a checkpoint that does not fit, in the first and in the second try."""

    def limited(self: CheckpointFile, *given: Any, **options: Any) -> None:
        full[0] -= 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full[0] == 0 else most[0], most[1]))
        try:
            write(self, *given, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)

    monkeypatch.setattr(CheckpointFile, "save_checkpoint", limited)
    for left in ([], ["last.ckpt"]):
        shutil.rmtree(Path(cut.paths.cache) / "finetuned", ignore_errors=True)
        with pytest.raises(RuntimeError) as error:
            train(cut)
        told = _no_room(error.value)
        assert told and told.errno == errno.EFBIG
        assert [file.name for file in checkpoints.iterdir()] == left
        full.pop(0)
    full.append(0)
    train(cut)
    assert full == [-1]  # the first epoch was not trained again
    assert same(weights(Path(cut.run_dir) / "backbone"), weights(Path(whole.run_dir) / "backbone"))


def test_a_stage_that_is_forced_leaves_no_later_one_finished(make_config: Make) -> None:
    """Its metrics would be those of a backbone that is gone."""
    record = train(make_config("defense=none"))
    assert record["stages"] == ["finetune", "infer"] and "after/task_loss" in record["metrics"]
    record = train(make_config("defense=none", "stage=finetune", "force=true"))
    assert record["stages"] == ["finetune"] and "after/task_loss" not in record["metrics"]
    assert train(make_config("defense=none"))["stages"] == ["finetune", "infer"]


def test_what_only_evaluation_reads_trains_nothing_again(
    make_config: Make, labels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_config("telemetry.every_n_steps=3", run="first")
    record = finetuned(first)
    assert labels[-1] == "finetune"
    labels.clear()
    asked = ["evaluation.max_new_tokens=30", "evaluation.num_prompts=5", "vector.gate.num_prompts=9"]
    other = make_config("telemetry.every_n_steps=3", *asked, run="b")
    again = finetuned(other)
    assert not labels and other.key != first.key
    assert same(weights(Path(other.run_dir) / "backbone"), weights(Path(first.run_dir) / "backbone"))
    assert again["ledger"] == record["ledger"] and again["metrics"]["drift"] == record["metrics"]["drift"]
    curves = [(Path(config.run_dir) / "metrics.csv").read_text().splitlines() for config in (first, other)]
    trained, copied = ([row for row in some if row.startswith("finetune,")] for some in curves)
    assert copied and copied == [row for row in trained if ",during/" not in row]

    draw = SecVecDataModule.validation
    with monkeypatch.context() as patch:  # as with other rows in a file of validation
        patch.setattr(SecVecDataModule, "validation", lambda self, n: {k: v[1:] for k, v in draw(self, n).items()})
        finetuned(make_config("telemetry.every_n_steps=3", "evaluation.max_new_tokens=32", run="e"))
    assert labels == ["finetune"]  # its curves are of them
    labels.clear()

    (Path(first.run_dir) / "backbone" / "config.json").write_text("{}")  # it is no more what it was
    finetuned(make_config("telemetry.every_n_steps=3", "evaluation.max_new_tokens=31", run="c"))
    assert labels == ["finetune"]
    finetuned(make_config("telemetry.every_n_steps=3", "optimizer.lr=2e-4", run="d"))
    assert labels == ["finetune"] * 2


def test_all_is_checked_before_the_vector_is_trained(
    make_config: Make, labels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults of the stages that follow; nothing of the run is left."""
    run_of(make_config()).backbone  # noqa: B018
    labels.clear()
    key = "judge=llm", "judge.model=m", "judge.base_url=https://example.org/v1", "judge.api_key_env=NO_SUCH_KEY"
    for number, (given, error, says) in enumerate(
        [
            (["evaluation.max_new_tokens=500"], DataError, "exceed the model.s context"),
            (["data.num_benign=100000"], ConfigError, "data.num_benign"),
            (key, ConfigError, "NO_SUCH_KEY"),
            (["tune=lora", "tune.lora.target_modules=[c]"], ConfigError, "tune.lora.target_modules=all-linear"),
            (["vector.target_modules=[c]"], ConfigError, r"it has down_proj.*vector.target_modules=all-linear"),
        ]
    ):
        config = make_config("vector.lr=0.0023", *given, run=f"run{number}")
        with pytest.raises(error, match=says):
            train(config)
        assert not labels and not Path(config.run_dir).exists()
    config = make_config("vector.lr=0.0023", run="disk")
    monkeypatch.setattr(finetune.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(ArtifactError, match=r"take up to \d+\.\d GB, and 0\.0 GB are free"):
        train(config)
    assert not labels and not Path(config.run_dir).exists()


def test_the_record_says_what_was_wrong_with_a_pointer_that_cannot_be_read(tmp_path: Path) -> None:
    for content in ("", "{", json.dumps({"folder": str(tmp_path), "backbone": "x"})):
        (tmp_path / "pointer").write_text(content)
        assert finetune._trained(tmp_path / "pointer") is None


def test_callbacks_act_on_the_data_of_the_run_alone(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that a defense makes before has other curves: early stopping would end it by chance."""
    run, given = run_of(make_config("defense=none")), list[list[Any]]()

    class Stop(Exception):
        pass

    def fit(*arguments: Any) -> int:
        given.append(arguments[-1])
        raise Stop

    monkeypatch.setattr(runs, "fit", fit)
    monkeypatch.setattr(runs, "build_callbacks", lambda *_: ["early stopping"])
    module = run.module("finetune", run.backbone, 1e-3)
    for data in (None, run.data):
        with pytest.raises(Stop):
            run.fit(module, "some", 1, Path(run.config.run_dir), data=data)
    assert given == [["early stopping"], []]
