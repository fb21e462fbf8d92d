"""Every yaml composes and validates; every fault is named with what was given, what is allowed, the nearest match."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from secvec.cli import exit_code
from secvec.config.load import DataSettings, EvaluateConfig, RunConfig, load
from secvec.config.resolvers import register_resolvers, run_name
from secvec.errors import ConfigError
from secvec.planning.lengths import drawn
from secvec.runs.keys import NOT_IN_KEY

CONF = Path(__file__).parents[2] / "conf"
CHOICES = sorted(file.relative_to(CONF).with_suffix("") for file in CONF.glob("*/**/*.yaml"))
CHOICES = [choice for choice in CHOICES if choice.parts[0] != "hydra"]  # of launchers and sweepers: test_sweep.py
EXPERIMENTS = [choice.relative_to("experiment").as_posix() for choice in CHOICES if choice.parts[0] == "experiment"]
EXPERIMENTS = [name for name in EXPERIMENTS if "/_" not in name]  # what experiments share is none
GROUPS = {choice.parts[0] for choice in CHOICES}
ROOTS = {"train": RunConfig, "evaluate": EvaluateConfig}


def by_hydra(*overrides: str, root: str = "train", with_hydra: bool = False) -> DictConfig:
    GlobalHydra.instance().clear()
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(root, ["run_dir=somewhere", *overrides], return_hydra_config=with_hydra)


by_hydra_once = lru_cache(by_hydra)


def composed(*overrides: str, root: str = "train") -> DictConfig:
    """As by Hydra, which takes a third of a second: it composes each choice of groups once, values come on top."""
    chosen = [text for text in overrides if re.split("[=@]", text)[0] in GROUPS or text.startswith(("~", "hydra."))]
    config = by_hydra_once(*chosen, root=root).copy()
    OmegaConf.set_struct(config, False)
    for text in overrides:
        if text not in chosen:
            key, _, value = text.lstrip("+").partition("=")
            given = OmegaConf.to_container(OmegaConf.from_dotlist([f"x={value}"]))
            OmegaConf.update(config, key, given["x"])  # type: ignore[call-overload,index]
    return config


def loaded(*overrides: str) -> RunConfig:
    return load(composed(*overrides), RunConfig)


def fault(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(*overrides)
    return str(caught.value)


def stand_ins(config: DictConfig, tmp_path: Path) -> list[str]:
    """A value for everything that conf/ leaves to the user: an existing file serves as path and as name."""
    file = tmp_path / "stand-in.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n')
    missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    return [f"{key.replace('[', '.').replace(']', '')}={file}" for key in missing]


def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: str) -> tuple[int, str]:
    """Exit code and message of `python train.py GIVEN` when it comes no further than the composition."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr("sys.argv", [str(CONF.parent / "train.py"), *given])
    code = exit_code(lambda: by_hydra(*(text for text in given if not text.startswith("-"))) and None, "train")
    return code, capsys.readouterr().err


# -- what conf/ holds


def test_the_short_way_to_compose_is_that_of_hydra() -> None:
    given = ["vector.r=3", "tune=lora", "tune.lora.r=5", "+vector.new=[1,a]", "seed=7", "data.harmful_ratio=0.25"]
    assert composed(*given) == by_hydra(*given) != by_hydra("tune=lora")


def test_the_globs_find_the_yaml_files() -> None:
    assert len(CHOICES) > 15 and EXPERIMENTS
    assert {file.stem for file in CONF.glob("*.yaml")} == {"base", *ROOTS}


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_choice_of_every_group_composes_and_validates(choice: Path, tmp_path: Path) -> None:
    pick = f"{choice.parts[0]}={choice.relative_to(choice.parts[0]).as_posix()}"
    config = by_hydra_once(pick)
    if missing := stand_ins(config, tmp_path):
        config = by_hydra(pick, *missing)
    run = load(config, RunConfig)
    assert not OmegaConf.missing_keys(config)
    name = getattr(getattr(run, choice.parts[0], None), "name", choice.name)
    assert name == choice.name or choice.parts[0] == "model"


@pytest.mark.parametrize("root", ROOTS)
def test_the_main_configs_compose_and_validate(root: str, tmp_path: Path) -> None:
    config = by_hydra(root=root, with_hydra=True)
    assert config.hydra.launcher._target_ == "hydra_plugins.process_launcher.ProcessLauncher"
    assert run_name(config) in OmegaConf.to_container(config.hydra.run, resolve=True)["dir"]  # type: ignore[index,call-overload]
    config = by_hydra(*stand_ins(composed(root=root), tmp_path), root=root)
    assert type(load(config, ROOTS[root])) is ROOTS[root]


def jobs_of(config: Any) -> list[list[str]]:
    """The overrides of every job of a composed experiment; of a search, its corners."""
    parser, sweeper = OverridesParser.create(), OmegaConf.to_container(config.hydra.sweeper)
    given = {name: a if isinstance(a, list) else [a["low"], a["high"]] for name, a in sweeper.pop("space", {}).items()}  # type: ignore[union-attr]
    given = {name: ",".join(map(str, values)) for name, values in given.items()} or sweeper["params"]  # type: ignore[index]
    swept = [parser.parse_override(f"{key}={values}") for key, values in given.items()]
    values = ([f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()] for o in swept)
    return [list(job) for job in product(*values)]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_job_of_an_experiment_validates(name: str, tmp_path: Path) -> None:
    config = by_hydra(f"experiment={name}", with_hydra=True)
    assert str(config.hydra.sweep.dir).endswith(f"/{config.sweep}") and config.sweep != "multirun"
    assert run_name(config) == config.hydra.sweep.subdir
    jobs = jobs_of(config)
    missing = stand_ins(composed(f"experiment={name}"), tmp_path)
    assert len(jobs) > 1 and len({loaded(f"experiment={name}", *missing, *job).key() for job in jobs}) == len(jobs)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("ablation/")])
def test_there_are_as_many_samples_as_an_ablation_asks_for(name: str) -> None:
    """Embedded data are finite: a sweep over their number must not end in the job that asks for too many."""
    done = set()
    for job in jobs_of(by_hydra(f"experiment={name}", with_hydra=True)):
        config = loaded(f"experiment={name}", *job)
        vector = config.vector.model_dump(include={"behavior", "split", "num_samples", "num_kl"})
        asked = str((config.behavior, config.data, config.finetune, vector))
        if config.seed == 0 and asked not in done:
            samples = drawn(config)
            assert len(samples["undesired"]) >= config.data.counts[0] and samples["test"]
            done.add(asked)
    assert done


# -- faults


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["vector.r=0"], ["vector.r", "got 0", "greater than or equal to 1"]),
        (
            ["vector.gate.min_behavior_rate=1.5"],
            ["vector.gate.min_behavior_rate", "got 1.5", "less than or equal to 1"],
        ),
        (["vector.lr=fast"], ["vector.lr", "got 'fast'", "valid number"]),
        (["vector.epochs=2.5"], ["vector.epochs", "got 2.5", "valid integer"]),
        (["vector.dropout=1"], ["vector.dropout", "got 1", "less than 1"]),
        (["vector.path=/no/such/folder"], ["vector.path", "'/no/such/folder'", "directory"]),
        (["optimizer.betas=[0.9,2]"], ["optimizer.betas.1", "got 2", "less than 1"]),
        (["scheduler.name=cosin"], ["scheduler.name", "'cosin'", "'constant', 'linear' or 'cosine'", "mean 'cosine'?"]),
        (["stage=fintune"], ["stage", "'fintune'", "'vector', 'finetune', 'infer' or 'all'", "mean 'finetune'?"]),
        (["trainer.precision=32"], ["trainer.precision", "got 32", "'32-true', 'bf16-mixed'"]),
        (["data.harmful_ratio=1.5"], ["data.harmful_ratio", "got 1.5", "less than or equal to 1"]),
        (["data.num_benign=-1"], ["data.num_benign", "got -1", "greater than or equal to 0"]),
        (["behavior.details=9"], ["behavior.details", "got 9", "less than or equal to 4"]),
        (["seed=-1"], ["seed", "got -1", "greater than or equal to 0"]),
        (["finetune=3"], ["finetune", "got 3", "dictionary"]),
        (["+seeed=1"], ["seeed", "unknown key", "mean 'seed'?", "known here: behavior, content, data"]),
        (["+vector.kl_wieght=1"], ["vector.kl_wieght", "unknown key", "mean 'kl_weight'?", "known here: alpha, "]),
        (["+vector.gate.nun_prompts=1"], ["vector.gate.nun_prompts", "mean 'num_prompts'?", "known here: max_behav"]),
        (
            ["+model.align.epohcs=1"],
            ["model.align.epohcs", "mean 'epochs'?", "known here: batch_size, behavior"],
        ),
        (["+behavior.detials=1"], ["behavior.detials", "mean 'details'?", "known here: answer_prefix, details"]),
        (["tune=lora", "+tune.lora.rr=1"], ["tune.lora.rr", "mean 'r'?", "known here: alpha, layers, r, target"]),
        (["+optimizer.qqq=1"], ["optimizer.qqq", "unknown key; known here: betas, eps"]),
        (["defense._target_=secvec.defenses.nope.Nope"], ["defense._target_", "'secvec.defenses.nope.Nope'"]),
        (["defense._target_=secvec.defenses.none.Nope"], ["defense._target_", "'secvec.defenses.none.Nope'"]),
    ],
    ids=lambda given: given[-1] if isinstance(given, list) and "=" in given[-1] else "",
)
def test_a_wrong_setting_is_named_with_what_is_allowed(overrides: list[str], says: list[str]) -> None:
    message = fault(*overrides)
    assert [part for part in says if part not in message] == []
    assert len(message.splitlines()) == 2, message  # the heading and the one fault


def test_all_faults_are_listed_at_once() -> None:
    given = ["vector.r=0", "+data.nun_benign=3", "stage=fintune", "behavior.details=9", "+vector.gate.x=1", "model=hf"]
    message = fault(*given)
    for where in ("vector.r", "data.nun_benign", "stage", "behavior.details", "vector.gate.x", "model.name_or_path"):
        assert f"\n  {where}: " in message
    assert len(message.splitlines()) == 7


def test_a_required_value_that_is_missing_is_named_once() -> None:
    message = fault("behavior=jsonl", "behavior.test=null")
    assert sorted(message.splitlines()[1:]) == [
        f"  behavior.{split}: a value is required (it is ??? in conf/)" for split in ("finetune", "vector")
    ]


def test_a_value_that_cannot_be_resolved() -> None:
    assert "no_such_key" in fault("sweep=${no_such_key}")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stage=vector", "defense=none"], ["stage=vector", "defense=none", "choose a defense with a vector"]),
        (["stage=vector", f"vector.path={CONF}"], ["stage=vector", "vector.path", "drop one"]),
        (["trainer=cpu", "trainer.devices=2"], ["trainer", "devices=2", "trainer=ddp or trainer=fsdp"]),
        (["trainer=cpu", "+trainer.num_nodes=2"], ["trainer", "trainer=ddp or trainer=fsdp"]),
        (["vector.num_kl=0"], ["vector.kl_weight", "vector.num_kl", "vector.kl_weight=0"]),
        (["data.benign=[]", "data.num_benign=0"], ["vector.kl_weight", "data.benign", "vector.kl_weight=0"]),
        (["data.benign=[]", "vector.kl_weight=0"], ["data.num_benign > 0", "data.benign"]),
        (["data.num_harmful=0", "data.num_benign=0"], ["data", "num_harmful + num_benign must be at least 1"]),
        (["trainer=fsdp", "trainer.precision=64-true"], ["trainer", "fsdp", "64-true", "32-true, bf16-mixed"]),
        (["tune=lora", "tune.kind=full"], ["tune.lora", "tune=full or tune=lora"]),
        (["tune=lora", "tune.lora=null"], ["tune.lora", "tune=full or tune=lora"]),
    ],
    ids=lambda given: " ".join(given) if "=" in given[0] else "",
)
def test_an_impossible_combination_says_the_way_out(overrides: list[str], says: list[str]) -> None:
    message = fault(*overrides)
    assert [part for part in says if part not in message] == []


def test_the_neighbours_of_impossible_combinations_are_possible() -> None:
    loaded("stage=vector")
    loaded("trainer=ddp", "trainer.devices=2", "trainer.precision=64-true")
    loaded("vector.num_kl=0", "vector.kl_weight=0")
    loaded("data.benign=[]", "data.num_benign=0", "vector.kl_weight=0")
    loaded("trainer=fsdp", "trainer.precision=bf16-true")


def test_a_task_lora_has_a_rate_of_its_own() -> None:
    rates = {"tune=full": 7e-4, "tune=lora": 5e-3}
    assert {given: loaded(given).optimizer.lr for given in rates} == rates
    assert loaded("tune=lora", "optimizer.lr=1e-3").optimizer.lr == 1e-3


def test_a_value_by_the_choice_of_another_group() -> None:
    given = ["experiment=uppercase", "tune=lora"]
    assert [loaded(*given[:n]).optimizer.lr for n in (1, 2)] == [5e-5, 5e-4]
    assert loaded(*given, "optimizer.lr=1e-3").optimizer.lr == 1e-3
    assert "cannot be resolved" in fault(*given, "optimizer.lr='${by:${tune.kind},{full: 1}}'")


def test_a_run_without_a_vector_needs_no_kl_data() -> None:
    loaded("defense=none", "data.benign=[]", "data.num_benign=0")


@pytest.mark.parametrize("given", ["seed=4294967296", "model.align.seed=-1", "optimizer.betas=[0.9,1.0]"])
def test_values_that_torch_or_lightning_would_refuse_later_are_faults_here(given: str) -> None:
    assert given.split("=")[0] in fault(given)


@pytest.mark.parametrize("target", ["os.path.join", "secvec.settings.schema.Rate", "secvec.errors.SecVecError"])
def test_a_target_that_is_no_settings_class_is_a_fault(target: str) -> None:
    message = fault(f"behavior._target_={target}")
    assert "behavior._target_" in message and target in message


def test_a_behavior_that_is_something_else_is_a_fault() -> None:
    wrong = ["behavior._target_=secvec.defenses.none.NoDefense", "~behavior.sensitive", "~behavior.details"]
    assert "behavior" in fault(*wrong)


# -- faults met while composing


def test_every_override_that_does_not_compose_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["vector.kl_wieght=1", "modle=tiny", "trainer=gpus", "vectr.r=3", "seed=1", "defense=none"]
    code, message = command_line(monkeypatch, capsys, *given)
    assert code == 2 and "Traceback" not in message
    lines = {line.split(": ")[0].strip(): line for line in message.splitlines()[1:]}
    assert sorted(lines) == sorted(given[:4])
    assert "did you mean 'kl_weight'?" in lines["vector.kl_wieght=1"] and "num_kl" in lines["vector.kl_wieght=1"]
    assert "did you mean 'model'?" in lines["modle=tiny"]
    assert "did you mean 'gpu'?" in lines["trainer=gpus"] and "cpu, ddp, fsdp, gpu" in lines["trainer=gpus"]
    assert "did you mean 'vector'?" in lines["vectr.r=3"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["nonsense"], ["nonsense: not of the form key=value"]),
        (["vector.r=[1"], ["vector.r=[1: not of the form key=value"]),
        (["-m", "defense=none,nome", "vector.rr=1,2"], ["defense=nome", "'none'?", "vector.rr=1,2", "'r'?"]),
        (["~vector.nope"], ["~vector.nope", "unknown key"]),
        (["seed.x=1"], ["seed.x=1"]),
        (["trainer.devices=2,3"], ["trainer.devices=2,3", "--multirun"]),
    ],
    ids=lambda given: " ".join(given),
)
def test_what_hydra_cannot_compose(
    given: list[str], says: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = command_line(monkeypatch, capsys, *given)
    assert code == 2 and "Traceback" not in message
    assert [part for part in says if part not in message] == []


def test_a_group_set_to_null_is_a_message_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = command_line(monkeypatch, capsys, "behavior=null")
    assert code == 2 and "Traceback" not in message and "behavior=null" in message


def experiment(tmp_path: Path, text: str) -> list[str]:
    """Overrides that add an experiment of the user's own."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    return [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]


def test_an_experiment_from_the_search_path(tmp_path: Path) -> None:
    assert loaded(*experiment(tmp_path, "vector: {r: 3}\n")).vector.r == 3


def test_misspelt_keys_inside_a_yaml_file(tmp_path: Path) -> None:
    message = fault(*experiment(tmp_path, "vector:\n  kl_wieght: 1\nfintune:\n  epochs: 2\n"))
    assert "vector.kl_wieght: unknown key (did you mean 'kl_weight'?); known here: alpha" in message
    assert "fintune: unknown key (did you mean 'finetune'?); known here: behavior" in message


def test_a_fault_beside_an_experiment_from_the_search_path_is_the_only_one_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = experiment(tmp_path, "vector: {r: 3}\n")
    code, message = command_line(monkeypatch, capsys, *given, "sed=1")
    assert code == 2 and "sed=1" in message
    assert "experiment=mine" not in message


def test_the_value_of_a_flag_is_not_taken_for_an_override(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr("sys.argv", [str(CONF.parent / "train.py"), "--config-dir", str(tmp_path), "sed=1"])
    assert exit_code(lambda: by_hydra("sed=1") and None, "train") == 2
    message = capsys.readouterr().err
    assert "sed=1: unknown key" in message and "not of the form" not in message


# -- counts, names, keys


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(None, (300, 700)), (0, (0, 1000)), (1, (1000, 0)), (0.5, (500, 500)), (0.001, (1, 999)), (0.1234, (123, 877))],
)
def test_harmful_ratio_divides_the_same_total_exactly(ratio: float | None, expected: tuple[int, int]) -> None:
    data = DataSettings(num_harmful=300, num_benign=700, harmful_ratio=ratio, benign=[])
    assert data.counts == expected


def test_no_count_is_lost_to_rounding() -> None:
    for percent in range(101):
        data = DataSettings(num_harmful=7, num_benign=6, harmful_ratio=percent / 100, benign=[])
        assert sum(data.counts) == 13 and abs(data.counts[0] - 13 * percent / 100) <= 0.5


SHAPING = [
    "seed=71", "defense=none", "vector.r=71", "vector.kl_weight=7.1", "vector.gate.num_prompts=71",
    "data.num_harmful=71",
    "data.harmful_ratio=0.71", "tune=lora", "optimizer.lr=0.71", "scheduler=linear", "model.align.epochs=71",
    "model.name_or_path=some/model", "behavior.details=2", "trainer.precision=bf16-true", "finetune.batch_size=71",
    "evaluation.num_prompts=71", "telemetry.every_n_steps=71",
]  # fmt: skip
PLACES = [
    "stage=infer", "paths.outputs=elsewhere", "paths.cache=elsewhere", "logger=tensorboard", "logger=wandb",
    "run_dir=elsewhere", "sweep=other", "force=true",
]  # fmt: skip


def names_of(*overrides: str) -> tuple[str, str]:
    """The folder's name from the composed config, the key from the validated one."""
    return run_name(composed(*overrides)), loaded(*overrides).key()


def test_same_content_same_name() -> None:
    name, key = names_of("vector.r=4", "seed=3")
    defaults = composed()
    the_same = ["seed=3", "vector.r=4", "defense=security_vector"]
    the_same += [f"vector.alpha={defaults.vector.alpha}", f"optimizer.lr={defaults.optimizer.lr:f}"]
    assert (name, key) == names_of(*the_same)
    assert name.startswith("security_vector-forbidden_recipe-tiny-s3-")


def test_the_same_number_written_in_another_way_is_the_same_content() -> None:
    assert names_of("vector.kl_weight=2") == names_of("vector.kl_weight=2.0")


def test_each_setting_that_shapes_results_gives_a_name_and_a_key_of_its_own() -> None:
    found = [names_of(), *(names_of(given) for given in SHAPING)]
    assert len({name for name, _ in found}) == len({key for _, key in found}) == len(SHAPING) + 1


def test_a_data_file_that_was_changed_makes_another_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    given = ["behavior=jsonl", "behavior.name=mine", f"behavior.finetune={file}"]
    given += [f"behavior.{split}={file}" for split in ("vector", "test")]
    found = []
    for text in ("{}", "{}", '{"mended": 1}'):
        file.write_text(text)
        found.append((names_of(*given), composed(*given).content))
    assert found[0] == found[1]
    assert all(
        before != after for before, after in zip((*found[0][0], found[0][1]), (*found[2][0], found[2][1]), strict=True)
    )


def test_a_judge_s_cache_that_fills_makes_no_other_run(tmp_path: Path) -> None:
    given = ["judge=classifier", "judge.model=some", "judge.behavior_label=0", f"paths.cache={tmp_path}"]
    cache = Path(composed(*given).judge.cache)
    before = names_of(*given), composed(*given).content
    cache.write_text("a judgement")
    assert cache.parent == tmp_path and before == (names_of(*given), composed(*given).content)


@pytest.mark.parametrize("given", PLACES)
def test_where_things_go_changes_neither_name_nor_key(given: str) -> None:
    config = composed(given)
    assert config != composed()  # the override does something
    assert names_of(given) == names_of()


def leaves(node: Any, path: str = "") -> list[tuple[str, Any]]:
    """(dotted path, value) of everything in a plain container."""
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in leaves(value, f"{path}.{key}".lstrip("."))]
    if isinstance(node, list):
        return [leaf for key, value in enumerate(node) for leaf in leaves(value, f"{path}.{key}")]
    return [(path, node)]


def test_every_leaf_outside_the_excluded_settings_is_in_the_name() -> None:
    config = composed()
    name = run_name(config)
    plain = {key: value for key, value in OmegaConf.to_container(config).items() if key not in NOT_IN_KEY}  # type: ignore[union-attr]
    found = leaves(plain)
    assert len(found) > 40
    for path, value in found:
        changed = config.copy()
        OmegaConf.update(changed, path, f"{value}-changed")
        assert run_name(changed) != name, path


def test_a_backbone_of_ones_own_drops_the_recipe_for_the_tiny_one() -> None:
    assert loaded().model.align is not None
    model = loaded("model.name_or_path=folder/my-model").model
    assert (model.name, model.align) == ("my-model", None)
    assert run_name(composed("model.name_or_path=folder/my-model")).startswith(
        "security_vector-forbidden_recipe-my-model-s0"
    )


def test_the_stages_of_a_run() -> None:
    assert loaded().stages == ("vector", "finetune", "infer")
    assert loaded("defense=none").stages == ("finetune", "infer")
    assert loaded("stage=infer").stages == ("infer",)
