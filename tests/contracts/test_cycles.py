"""Fine-tunes one after another: each from the backbone before it, on new samples, with an old or a new vector."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from secvec.config.schema import RunConfig
from secvec.data.datamodule import SecVecDataModule
from secvec.errors import ArtifactError, ConfigError, GateError
from secvec.models.backbone import Backbone, fingerprint
from secvec.run import Run
from secvec.stages import finetune, vector
from secvec.stages.finetune import REFITTED
from tests.contracts.test_stages import finetuned, same, weights

Make = Callable[..., RunConfig]


def backbone(config: RunConfig) -> dict[str, Tensor]:
    return weights(Path(config.run_dir) / "backbone")


def test_cycles_go_on_from_each_other_on_new_samples(make_config: Make, tmp_path: Path) -> None:
    """The second cycle starts from the backbone that a run of one cycle saves, and has samples of its own."""
    first, both = make_config("defense=none", run="first"), make_config("defense=none", "finetune.cycles=2", run="both")
    finetuned(first), finetuned(both)
    cycles = Path(both.paths.cache) / "cycles"
    (kept,) = (folder for folder in cycles.iterdir() if folder.is_dir())
    assert same(weights(kept / "backbone"), backbone(first)) and not same(backbone(first), backbone(both))
    one, two = SecVecDataModule.of(both).mixtures
    assert [len(some["undesired"] + some["benign"]) for some in (one, two)] == [32, 32]
    assert not {e.prompt for some in one.values() for e in some} & {e.prompt for some in two.values() for e in some}
    record = json.loads((Path(both.run_dir) / "record.json").read_text())
    assert record["data"]["counts"]["finetune"] == {"ordinary": 16, "task": 16, "undesired": 32}
    finetuned(make_config("defense=none", "finetune.cycles=3", run="three"))
    assert len([folder for folder in cycles.iterdir() if folder.is_dir()]) == 2  # the first cycle was not run again


def test_a_vector_may_be_trained_anew_for_each_cycle(make_config: Make) -> None:
    kept = make_config("finetune.cycles=2", run="kept")
    refitted = make_config("finetune.cycles=2", "defense=refitted_vector", run="refitted")
    finetuned(kept), finetuned(refitted)
    folder = Path(refitted.run_dir)
    old, new = folder / "vector", folder / REFITTED
    meta = [json.loads((path / "secvec.json").read_text())["backbone"] for path in (old, new)]
    assert meta[0] == run_of(refitted).backbone.fingerprint != meta[1]  # of the backbone after the first cycle
    assert fingerprint(old) == fingerprint(Path(kept.run_dir) / "vector") != fingerprint(new)
    assert not same(backbone(kept), backbone(refitted)) and not (Path(kept.run_dir) / REFITTED).exists()


def test_a_vector_trained_anew_that_has_learned_nothing_is_refused(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("finetune.cycles=2", "defense=refitted_vector", "vector.gate.min_loss_drop=1e-4")
    finetuned(make_config(*given, run="learned"))

    def without_effect(run: Run, backbone: Backbone, label: str) -> Path:
        folder = shutil.copytree(vector.train_vector(run, backbone, label), tmp_path / "nothing", dirs_exist_ok=True)
        state = load_file(folder / "adapter_model.safetensors")
        save_file({n: t * ("lora_B" not in n) for n, t in state.items()}, folder / "adapter_model.safetensors")
        return folder

    monkeypatch.setattr(finetune, "train_vector", without_effect)
    with pytest.raises(GateError, match=r"the vector for cycle 2: .*does the backbone show the behavior already"):
        finetuned(make_config(*given, run="nothing"))


def test_room_for_earlier_cycles_is_checked_before_the_first(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(free=0), SimpleNamespace(free=10**12)
    monkeypatch.setattr(finetune.shutil, "disk_usage", lambda path: full[Path(path).name != "cycles"])
    with pytest.raises(ArtifactError, match=r"the backbones of 9 earlier cycles take up to 0\.0 GB.*set paths\.cache"):
        finetuned(make_config("defense=none", "finetune.cycles=10"))


def test_a_vector_that_is_given_is_not_trained_anew(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"defense=refitted_vector trains its vectors: drop vector\.path"):
        make_config("defense=refitted_vector", f"vector.path={tmp_path}")
