"""Every yaml composes and validates; every fault is named with what was given, what is allowed, the nearest match."""

from __future__ import annotations

import pkgutil
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from configs import CHOICES, CONF, by_hydra, by_hydra_once, composed
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from secvec.cli import report_user_errors
from secvec.config.load import load
from secvec.config.replay import replay_yaml
from secvec.config.resolvers import register_resolvers, resolved, run_name, sweep_name
from secvec.config.schema import DataSettings, EvaluateConfig, RunConfig
from secvec.data.datamodule import SecVecDataModule
from secvec.errors import ConfigError
from secvec.planning.lengths import samples_of
from secvec.runs.keys import NOT_IN_KEY
from secvec.settings.messages import RENAMED, renamed

EXPERIMENTS = [choice.relative_to("experiment").as_posix() for choice in CHOICES if choice.parts[0] == "experiment"]
ROOTS = {"train": RunConfig, "evaluate": EvaluateConfig}


def loaded(*overrides: str) -> RunConfig:
    return load(composed(*overrides), RunConfig)


@pytest.mark.parametrize("debug", ["fast_dev_run", "limit", "overfit", "profiler"])
def test_untrusted_data_can_be_debugged(debug: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    mine = [
        "recipe=tiny",
        "behavior=jsonl",
        f"behavior.file={file}",
        "data=untrusted",
        f"data.file={file}",
        "judge=none",
    ]
    assert loaded(*mine, f"debug={debug}").data.num_harmful == 0
    assert loaded(f"debug={debug}").data.num_harmful == (8 if debug == "overfit" else 24)


def fault(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(*overrides)
    return str(caught.value)


def stand_ins(config: DictConfig, tmp_path: Path) -> list[str]:
    """A value for everything that conf/ leaves to the user: an existing file serves as path and as name."""
    file = tmp_path / "stand-in.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n')
    missing = sorted(str(key) for key in OmegaConf.missing_keys(config) if not str(key).startswith("hydra."))
    own = {
        "behavior": config.behavior,
        **{f"data.benign.{name}": stream for name, stream in config.data.benign.items()},
    }
    missing += [f"{key}.file" for key, rows in own.items() if "file" in rows]
    for part in ("behavior", "data"):  # of an experiment on own files
        files = config[part].items_ex(resolve=False)
        missing += [f"{part}.{field}" for field, path in files if str(path).endswith(".jsonl")]
    lists = {"judge.phrases"}
    given = {key.replace("[", ".").replace("]", ""): f"[{file}]" if key in lists else file for key in missing}
    others = {"model.name_or_path"} & given.keys() or config.model.name_or_path
    needed = ["recipe=small_llm"] if others and config.recipe.name == "auto" else []
    needed += ["judge=none"] if config.behavior.name in ("aoa", "jsonl") and config.judge is None else []
    return [*needed, *(f"{key}={value}" for key, value in given.items())]


def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: str) -> tuple[int, str]:
    """Exit code and message of `python train.py GIVEN` when it comes no further than the composition."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr("sys.argv", [str(CONF.parent / "train.py"), *given])
    code = report_user_errors(lambda: by_hydra(*(text for text in given if not text.startswith("-"))) and None, "train")
    return code, capsys.readouterr().err


# -- what conf/ holds


def test_the_short_way_to_compose_is_that_of_hydra() -> None:
    given = ["vector.r=3", "tune=lora", "tune.lora.r=5", "+vector.new=[1,a]", "seed=7", "data.harmful_ratio=0.25"]
    assert composed(*given) == by_hydra(*given) != by_hydra("tune=lora")


def test_the_globs_find_the_yaml_files() -> None:
    assert len(CHOICES) > 15 and EXPERIMENTS
    assert {file.stem for file in CONF.glob("*.yaml")} == {"base", "common", *ROOTS}


@pytest.mark.parametrize("choice", [one for one in CHOICES if one.parts[0] != "experiment"], ids=str)
def test_every_choice_of_every_group_composes_and_validates(choice: Path, tmp_path: Path) -> None:
    key = "+stream@data.benign.more" if choice.parts[0] == "stream" else choice.parts[0]
    pick = f"{key}={choice.relative_to(choice.parts[0]).as_posix()}"
    config = by_hydra_once(pick)
    if missing := stand_ins(config, tmp_path):
        config = composed(pick, *missing)
    run = load(config, RunConfig)
    assert not OmegaConf.missing_keys(config)
    name = getattr(getattr(run, choice.parts[0], None), "name", choice.name)
    assert name == choice.name or choice.parts[0] in ("model", "scheduler")


@pytest.mark.parametrize("root", ROOTS)
def test_the_main_configs_compose_and_validate(root: str, tmp_path: Path) -> None:
    config = by_hydra(root=root, with_hydra=True)
    assert config.hydra.launcher._target_ == "hydra_plugins.process_launcher.ProcessLauncher"
    assert run_name(config) in OmegaConf.to_container(config.hydra.run, resolve=True)["dir"]  # type: ignore[index,call-overload]
    model = ["recipe=llm", "model.name_or_path=some/folder"] * (root == "evaluate")  # a scan finds it by the vector
    config = by_hydra(*stand_ins(composed(root=root), tmp_path), *model, root=root)
    assert type(load(config, ROOTS[root])) is ROOTS[root]


def jobs_of(config: Any, every: bool) -> list[list[str]]:
    """The overrides of each job of a composed experiment, of its first seed alone; of a search, its corners.

    Without `every`, as few jobs as give each axis each of its values.
    """
    parser, sweeper = OverridesParser.create(), OmegaConf.to_container(config.hydra.sweeper)
    given = {name: a if isinstance(a, list) else [a["low"], a["high"]] for name, a in sweeper.pop("space", {}).items()}  # type: ignore[union-attr]
    given = {name: ",".join(map(str, values)) for name, values in given.items()} or sweeper["params"]  # type: ignore[index]
    swept = [parser.parse_override(f"{key}={values}") for key, values in given.items()]
    axes = {
        o.get_key_element(): list(o.sweep_string_iterator()) if o.is_sweep_override() else [o.get_value_string()]
        for o in swept
    }
    axes |= {key: values[:1] for key, values in axes.items() if key == "seed"}
    jobs = product(*([f"{key}={value}" for value in values] for key, values in axes.items()))
    if not every:
        last = max(map(len, axes.values()), default=1) - 1
        named = [[f"{key}={values[i % len(values)]}" for key, values in axes.items()] for i in range(last + 1)]
        largest = [f"{key}={values[-1]}" for key, values in axes.items()]
        jobs = dict.fromkeys(map(tuple, [*named, largest]))  # type: ignore[assignment]
    return list(map(list, jobs))


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize(
    "every", [pytest.param(False, id="values"), pytest.param(True, id="jobs", marks=pytest.mark.slow)]
)
def test_every_job_of_an_experiment_validates(name: str, every: bool, tmp_path: Path) -> None:
    """And an ablation has its samples: a sweep over their number must not end in the job that asks for too many."""
    config = by_hydra(f"experiment={name}", with_hydra=True)
    assert str(config.hydra.sweep.dir).endswith(f"/{config.sweep}") and config.sweep
    assert run_name(config) == config.hydra.sweep.subdir
    jobs = jobs_of(config, every)
    missing = stand_ins(config, tmp_path)
    runs = [loaded(f"experiment={name}", *missing, *job) for job in jobs]
    # without a vector, what only the vector has does not make another run
    distinct = {tuple(o for o in job if "defense=none" not in job or not o.startswith("vector=")) for job in jobs}
    assert len({run.key for run in runs}) == len(distinct)
    if name.startswith("ablation/"):  # on embedded data, which are finite
        asked = {}
        for run in runs:
            vector = run.vector.model_dump(include={"behavior", "split", "num_samples", "num_kl"})
            asked[str((run.behavior, run.data, run.finetune, vector))] = run
        for run in asked.values():
            data = SecVecDataModule.of(run)
            data.check(dict.fromkeys((*run.stages, "finetune")))
            samples = samples_of(data, run.stages)
            assert len(samples["undesired"]) >= run.data.counts[0] and samples["test"]
        assert asked


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
        (["optimizer.betas=[0.9,2]"], ["optimizer: torch.optim.AdamW: ", "beta parameter at index 1: 2"]),
        (["scheduler.name=cosin"], ["scheduler: name: ", "'cosin'", "allowed: linear, cosine, ", "mean 'cosine'?"]),
        (["stage=fintune"], ["stage", "'fintune'", "'vector', 'finetune', 'infer' or 'all'", "mean 'finetune'?"]),
        (["trainer.precision=32"], ["trainer.precision", "got 32", "'32-true', 'bf16-mixed'"]),
        (["data.harmful_ratio=1.5"], ["data.harmful_ratio", "got 1.5", "less than or equal to 1"]),
        (["data.num_benign=-1"], ["data.num_benign", "got -1", "greater than or equal to 0"]),
        (["behavior.details=9"], ["behavior.details", "got 9", "less than or equal to 4"]),
        (["seed=-1"], ["seed", "got -1", "greater than or equal to 0"]),
        (["finetune=3"], ["finetune", "got 3", "dictionary"]),
        (["+seeed=1"], ["seeed", "unknown key", "mean 'seed'?", "known here: answer_judge, behavior, callbacks, "]),
        (["+vector.kl_wieght=1"], ["vector.kl_wieght", "unknown key", "mean 'kl_weight'?", "known here: alpha, "]),
        (["+vector.gate.nun_prompts=1"], ["vector.gate.nun_prompts", "mean 'num_prompts'?", "known here: max_behav"]),
        (
            ["+model.align.epohcs=1"],
            ["model.align.epohcs", "mean 'epochs'?", "known here: batch_size, behavior"],
        ),
        (["+behavior.detials=1"], ["behavior.detials", "mean 'details'?", "known here: answer_prefix, details"]),
        (["tune=lora", "+tune.lora.rr=1"], ["tune.lora.rr", "mean 'r'?", "known here: alpha, layers, r, target"]),
        (["+optimizer.qqq=1"], ["optimizer: torch.optim.AdamW takes no 'qqq'; it takes amsgrad, betas, "]),
        (["+optimizer.beta=1"], ["optimizer: torch.optim.AdamW takes no 'beta' (did you mean 'betas'?)"]),
        (["optimizer=sgd", "optimizer.momentum=-1"], ["optimizer: torch.optim.SGD: Invalid momentum value: -1"]),
        (["optimizer._target_=torch.optim.Adamw"], ["optimizer: cannot import 'torch.optim.Adamw'"]),
        (["optimizer._target_=torch.nn.Linear"], ["optimizer: _target_: torch.nn.Linear is no torch.optim.Optimizer"]),
        (["scheduler.name=reduce_lr_on_plateau"], ["no schedule 'reduce_lr_on_plateau'", "allowed: linear, "]),
        (
            ["scheduler.name=constant"],
            ["scheduler: constant has no warm-up", "constant_with_warmup, or warmup_ratio=0"],
        ),
        (["+scheduler.options.num_cycle=1"], ["scheduler: cosine takes no 'num_cycle' (did you mean 'num_cycles'?)"]),
        (["scheduler.name=cosine_with_min_lr"], ["scheduler: cosine_with_min_lr: ", "min_lr or min_lr_rate"]),
        (["scheduler=polynomial", "optimizer.lr=1e-8"], ["scheduler: polynomial: lr_end (1e-07) must be smaller"]),
        (["+trainer.max_step=1"], ["trainer: lightning.Trainer takes no 'max_step' (did you mean 'max_steps'?)"]),
        (["trainer.limit_train_batches=2.5"], ["trainer: ", "2.5 for limit_train_batches", "[0.0, 1.0] or an int"]),
        (["trainer.limit_train_batches=half"], ["trainer: limit_train_batches=half: give a number of batches, or a"]),
        (["trainer.limit_val_batches=0.5"], ["trainer: limit_val_batches=0.5: validation has one batch of each kind"]),
        (["trainer.check_val_every_n_epoch=0"], ["trainer: check_val_every_n_epoch=0: give a whole number from 1 on"]),
        (["trainer.num_sanity_val_steps=abc"], ["trainer: num_sanity_val_steps=abc: give a whole number from -1 on"]),
        (["trainer.plugins=foo"], ["trainer: ", "Found invalid type for plugin"]),
        (["optimizer.lr=inf"], ["optimizer.lr", "finite"]),
        (["vector.kl_weight=inf"], ["vector.kl_weight", "finite"]),
        (
            ["behavior.reworded=[hello]"],
            ["behavior.reworded", "'hello' would be the same for every request", "{prompt}"],
        ),
        (["optimizer._target_=torch.optim.Adagrad"], ["takes no 'betas'", "~GROUP.NAME, as in ~optimizer.betas"]),
        (["trainer.profiler=simpl"], ["trainer: ", "`profiler`", "'simple', 'advanced'"]),
        (["+trainer.replicas=2"], ["trainer: replicas=2 are copies of sharded weights: choose trainer=fsdp"]),
        (
            ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=3", "trainer.replicas=2"],
            ["trainer: replicas=2 must divide the 3 processes"],
        ),
        (["+trainer.logger=true"], ["trainer: logger cannot be set: ", "logger=[csv,wandb]"]),
        (["+trainer.default_root_dir=x"], ["trainer: default_root_dir cannot be set: ", "paths.outputs"]),
        (["+callbacks.x.monitor=y"], ["callbacks.x._target_: required but not given"]),
        (["+callbacks.x._target_=torch.nn.Linear"], ["callbacks.x: ", "is no lightning.pytorch.callbacks.Callback"]),
        (["callbacks=early_stopping", "callbacks.early_stopping.mode=mn"], ["callbacks.early_stopping: ", "got mn"]),
        (
            ["callbacks=early_stopping", "+callbacks.early_stopping.patienc=1"],
            ["takes no 'patienc' (did you mean 'pat"],
        ),
        (["+logger.wandbb.offline=true"], ["logger: there is no logger 'wandbb' (did you mean 'wandb'?)", "_target_"]),
        (["logger=wandb", "+logger.wandb.ofline=true"], ["logger.wandb.ofline: unknown key (did you mean 'offline'?)"]),
        (
            ["+logger.x._target_=lightning.pytorch.loggers.CSVLogger", "+logger.x.dir=y"],
            ["logger.x: ", "takes no 'dir'"],
        ),
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
    message = fault("behavior=aoa", "behavior.test=null")
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
        (["~data.benign", "data.num_benign=0"], ["vector.kl_weight", "data.benign", "vector.kl_weight=0"]),
        (["~data.benign", "vector.kl_weight=0"], ["data.num_benign > 0", "data.benign"]),
        (["data.num_harmful=0", "data.num_benign=0"], ["data", "num_harmful + num_benign must be at least 1"]),
        (["trainer=fsdp", "trainer.precision=64-true"], ["trainer", "fsdp", "64-true", "32-true, bf16-mixed"]),
        (["trainer=fsdp", "trainer.precision=16-mixed"], ["trainer", "fsdp", "16-mixed", "32-true, bf16-mixed"]),
        (["trainer.precision=16-mixed", "defense=safegrad"], ["defense=safegrad", "16-mixed: use bf16-mixed"]),
        (["trainer.precision=16-mixed", "defense=booster"], ["defense=booster", "16-mixed: use bf16-mixed"]),
        (["trainer.precision=16-mixed", "optimizer=adamw_fused"], ["optimizer.fused=false", "bf16-mixed"]),
        (["trainer.accumulate_grad_batches=3", "trainer.limit_train_batches=4"], ["4 is no multiple of", "=3"]),
        (["trainer=fsdp", "trainer.accelerator=cpu"], ["fsdp on the CPU needs a number of processes", "set devices"]),
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
    loaded("~data.benign", "data.num_benign=0", "vector.kl_weight=0")
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
    loaded("defense=none", "~data.benign", "data.num_benign=0")


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ("seed=4294967296", "seed"),
        ("model.align.seed=-1", "model.align.seed"),
        ("optimizer.betas=[0.9,1.0]", "optimizer: torch.optim.AdamW: Invalid beta"),
    ],
)
def test_values_that_torch_or_lightning_would_refuse_later_are_faults_here(given: str, where: str) -> None:
    assert where in fault(given)


@pytest.mark.parametrize("target", ["os.path.join", "secvec.settings.schema.Rate", "secvec.errors.SecVecError"])
def test_a_target_that_is_no_settings_class_is_a_fault(target: str) -> None:
    message = fault(f"behavior._target_={target}")
    assert "behavior._target_" in message and target in message


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("behavior", "secvec.behaviors.base.Behavior"),
        ("judge", "secvec.judges.base.Judge"),
        ("defense", "secvec.defenses.base.Defense"),
        ("data.benign.task", "secvec.data.example.Stream"),
        ("vector.behavior", "secvec.behaviors.base.Behavior"),
        ("model.align.behavior", "secvec.behaviors.base.Behavior"),
    ],
)
def test_a_target_of_the_wrong_kind_says_what_was_expected(where: str, kind: str) -> None:
    others = ["judge=exact", "behavior@vector.behavior=uppercase", "behavior@model.align.behavior=uppercase"]
    wrong = "secvec.defenses.none.NoDefense" if where != "defense" else "secvec.judges.exact.Exact"
    (line,) = fault(*others, f"{where}._target_={wrong}").splitlines()[1:]
    name = kind.rpartition(".")[2]
    assert line == f"  {where}._target_: got '{wrong}'; this is no {name}; name a subclass of {kind}"


def test_a_plug_in_without_a_target_is_a_fault() -> None:
    assert fault("~behavior._target_").splitlines()[1:] == ["  behavior._target_: required but not given"]


def test_faults_inside_plug_ins_are_named_where_they_are() -> None:
    given = ["behavior=several", "+behavior.of.stereotype.sensitiv=1", "+data.benign.task.knd=1", "defense.name=[1]"]
    lines = sorted(line.split("; known")[0].strip() for line in fault(*given).splitlines()[1:])
    assert lines == [
        "behavior.of.stereotype.sensitiv: unknown key (did you mean 'sensitive'?)",
        "data.benign.task.knd: unknown key (did you mean 'kind'?)",
        "defense.name: got [1]; input should be a valid string",
    ]


# -- settings that have another name now


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("+data.benign.0.kind=task", "data.benign.0 is now data.benign.NAME"),
        ("data.weights=[3,1]", "data.weights.0 is now data.weights.NAME"),
        ("+finetune.refit_vector=true", "finetune.refit_vector is now defense=refitted_vector"),
        ("+defense.dropout=true", "defense.dropout is now vector.keep_dropout"),
        ("+trainer.num_threads=1", "trainer.num_threads is now num_threads"),
        ("+logger.offline=false", "logger.offline is now logger.wandb.offline"),
    ],
)
def test_an_old_setting_is_refused_with_its_new_name(given: str, says: str) -> None:
    assert fault(given).count(says) == 1


def test_the_new_name_of_an_old_setting_exists() -> None:
    assert renamed("defense=sv_no_kl") == "; defense=sv_no_kl is now vector=no_kl"
    assert renamed("data.benign.1.splits.test") == "; data.benign.1 is now data.benign.NAME"
    assert renamed("data.benign.task.choices.answer").startswith("; data.benign.task.choices is now an item")
    assert renamed("data.benign=[]") == "; data.benign=[] is now ~data.benign"
    assert [renamed(key) for key in ("defense", "defense=none", "data.benign", "data.benign.task.kind")] == [""] * 4
    for new in RENAMED.values():
        group, _, choice = new.partition("=")
        assert not choice or (CONF / group / f"{choice}.yaml").is_file()


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
    assert "did you mean 'gpu'?" in lines["trainer=gpus"] and "cpu, ddp, default, fsdp, gpu" in lines["trainer=gpus"]
    assert "did you mean 'vector'?" in lines["vectr.r=3"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["nonsense"], ["nonsense: not of the form key=value"]),
        (["vector.r=[1"], ["vector.r=[1: not of the form key=value"]),
        (["-m", "defense=none,nome", "vector.rr=1,2"], ["defense=nome", "'none'?", "vector.rr=1,2", "'r'?"]),
        (["~vector.nope"], ["~vector.nope", "unknown key"]),
        (["seed.x=1"], ["seed.x=1"]),
        (["logger=[csv,wandbb]"], ["logger=[csv,wandbb]: no such choice (did you mean 'wandb'?)"]),
        (["logger=[csv,wandb]", "vectr.r=1"], ["vectr.r=1"]),
        (["trainer.devices=2,3"], ["trainer.devices=2,3", "--multirun"]),
        (
            ["-m", "optimizer.lr=interval(0,1)", "sed=1"],
            ["cannot be composed:\n  sed=1: unknown key (did you mean 'seed'?"],
        ),
        (["--config-name", "nope", "seed=1"], ["seed=1", "Cannot find primary config 'nope'"]),
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
    assert "fintune: unknown key (did you mean 'finetune'?); known here: answer_judge" in message


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
    assert report_user_errors(lambda: by_hydra("sed=1") and None, "train") == 2
    message = capsys.readouterr().err
    assert "sed=1: unknown key" in message and "not of the form" not in message


@pytest.mark.parametrize(
    ("given", "says"),
    [("sede=3", "sede=3: unknown key (did you mean 'seed'?"), ("defense=none", "defense=none: ")],
)
def test_a_replayed_config_answers_mistakes_as_any_other(
    given: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It said that its own file could not be found."""
    (tmp_path / "config.yaml").write_text(replay_yaml(loaded("seed=1").composed))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    where = ["--config-dir", str(tmp_path), "--config-name", "config"]
    monkeypatch.setattr("sys.argv", [str(CONF.parent / "train.py"), *where, given])
    code = report_user_errors(lambda: by_hydra("sed=1") and None, "train")
    message = capsys.readouterr().err
    assert code == 2 and says in message and "Cannot find primary config" not in message


# -- counts, names, keys


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(None, (300, 700)), (0, (0, 1000)), (1, (1000, 0)), (0.5, (500, 500)), (0.001, (1, 999)), (0.1234, (123, 877))],
)
def test_harmful_ratio_divides_the_same_total_exactly(ratio: float | None, expected: tuple[int, int]) -> None:
    data = DataSettings(num_harmful=300, num_benign=700, harmful_ratio=ratio, benign={})
    assert data.counts == expected


def test_no_count_is_lost_to_rounding() -> None:
    for percent in range(101):
        data = DataSettings(num_harmful=7, num_benign=6, harmful_ratio=percent / 100, benign={})
        assert sum(data.counts) == 13 and abs(data.counts[0] - 13 * percent / 100) <= 0.5


SHAPING = [
    "seed=71", "defense=none", "vector.r=71", "vector.kl_weight=7.1", "vector.gate.num_prompts=71",
    "data.num_harmful=71",
    "data.harmful_ratio=0.71", "tune=lora", "optimizer.lr=0.71", "scheduler=linear", "model.align.epochs=71",
    "model.name_or_path=some/model", "behavior.details=2", "trainer.precision=bf16-true", "trainer.max_steps=71",
    "num_threads=71", "callbacks=early_stopping",
    "optimizer=adamw_fused", "scheduler.warmup_ratio=0.71", "finetune.batch_size=71",
    "evaluation.num_prompts=71", "telemetry.every_n_steps=71",
]  # fmt: skip
PLACES = [
    "stage=infer", "paths.outputs=elsewhere", "paths.cache=elsewhere", "logger=tensorboard", "logger=wandb",
    "run_dir=elsewhere", "sweep=other", "force=true",
]  # fmt: skip


def names_of(*overrides: str) -> tuple[str, str]:
    """The name of the run folder, and the key."""
    config = composed(*overrides)
    name, key = run_name(config), config.key
    assert name.endswith(f"-{key[:8]}")
    return name, key


def test_same_content_same_name() -> None:
    name, key = names_of("vector.r=4", "seed=3")
    defaults = composed()
    the_same = ["seed=3", "vector.r=4", "defense=security_vector"]
    the_same += [f"vector.alpha={defaults.vector.alpha}", f"optimizer.lr={defaults.optimizer.lr:f}"]
    assert (name, key) == names_of(*the_same)
    assert name.startswith("security_vector-forbidden_recipe-tiny-s3-")


def test_the_validated_config_has_the_key_of_the_composed_one() -> None:
    for given in ([], ["seed=3"], ["defense=none", "tune=lora"]):
        assert loaded(*given).key == composed(*given).key


def test_the_same_number_written_in_another_way_is_the_same_content() -> None:
    assert names_of("vector.kl_weight=2") == names_of("vector.kl_weight=2.0")


def test_each_setting_that_shapes_results_gives_a_name_and_a_key_of_its_own() -> None:
    found = [names_of(), *(names_of(given) for given in SHAPING)]
    assert len({name for name, _ in found}) == len({key for _, key in found}) == len(SHAPING) + 1


def test_the_vector_does_not_count_under_a_defense_that_uses_none() -> None:
    for given in ("vector.r=71", "vector=large", "behavior@vector.behavior=uppercase"):
        assert names_of(given) != names_of()
        assert names_of("defense=none", given) == names_of("defense=none")
    assert names_of("defense=none", "optimizer.lr=71") != names_of("defense=none")


@pytest.mark.parametrize("name", sorted(file.stem for file in CONF.glob("defense/*.yaml")))
def test_a_defense_whose_yaml_says_that_it_uses_no_vector_uses_none(name: str) -> None:
    config = by_hydra_once(f"defense={name}")
    assert load(config, RunConfig).defense.uses_vector is config.defense.get("uses_vector", True)


def test_a_data_file_that_was_changed_makes_another_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    given = ["behavior=jsonl", "behavior.name=mine", f"behavior.finetune={file}"]
    given += [f"behavior.{split}={file}" for split in ("vector", "test")]
    found = []
    for text in ("{}", "{}", '{"mended": 1}'):
        file.write_text(text)
        found.append(names_of(*given))
    assert found[0] == found[1]
    assert all(before != after for before, after in zip(found[0], found[2], strict=True))


def test_a_judge_s_cache_makes_no_other_run_where_it_lies_or_when_it_fills(tmp_path: Path) -> None:
    given = ["judge=classifier", "judge.model=some", "judge.behavior_label=0"]
    before = names_of(*given)
    cache = Path(composed(*given, f"paths.cache={tmp_path}").judge.cache)
    assert cache.parent == tmp_path and before == names_of(*given, f"paths.cache={tmp_path}")
    cache.write_text("a judgement")
    assert before == names_of(*given, f"paths.cache={tmp_path}")
    assert before != names_of("judge=classifier", "judge.model=other", "judge.behavior_label=0")


@pytest.mark.parametrize("given", PLACES)
def test_where_things_go_changes_neither_name_nor_key(given: str) -> None:
    config = composed(given)
    assert config != composed()  # the override does something
    assert names_of(given) == names_of()


# -- the config.yaml of a run folder


REPLAYED = {
    "the default": ["seed=3", "vector.r=2"],
    "an experiment": ["experiment=uppercase", "tune=lora"],
    "no vector": ["defense=none", "sweep=mine", "force=true", "plan=true", "stage=finetune"],
    "several behaviors": ["behavior=all_embedded", "model=tiny_joint"],
    "lists and texts": [
        "vector.layers=[0,1]",
        "data.weights={task: 1, ordinary: 3}",
        "model.name='\\${name} \u00e9 \"1e-5\"'",
    ],
}


@pytest.mark.parametrize("overrides", REPLAYED.values(), ids=REPLAYED)
def test_the_config_of_a_run_folder_composes_to_the_same_run(overrides: list[str], tmp_path: Path) -> None:
    original = load(by_hydra(*overrides), RunConfig)
    (tmp_path / "config.yaml").write_text(replay_yaml(original.composed))
    assert "train.py --config-dir THIS_FOLDER --config-name config" in replay_yaml(original.composed).splitlines()[0]

    def replayed(*given: str) -> RunConfig:
        search = f"hydra.searchpath=[file://{CONF}]"
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            return load(compose("config", ["run_dir=somewhere", search, *given]), RunConfig)

    again = replayed()
    assert again.key == original.key and again.model_dump() == original.model_dump() | {"force": False, "plan": None}
    assert replayed("optimizer.lr=7e-5").key != original.key


def test_the_config_of_an_evaluation_replays_too(tmp_path: Path) -> None:
    config = by_hydra("model.name_or_path=some/folder", "recipe=llm", root="evaluate")
    original = load(config, EvaluateConfig)
    (tmp_path / "config.yaml").write_text(replay_yaml(original.composed))
    assert "evaluate.py --config-dir" in replay_yaml(original.composed).splitlines()[0]
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        again = compose("config", ["run_dir=somewhere", f"hydra.searchpath=[file://{CONF}]"])
    assert load(again, EvaluateConfig).key == original.key


# -- the name of a sweep


def sweep_of(*overrides: str) -> str:
    """Name of the multirun that `python train.py -m OVERRIDES` is, by Hydra."""
    GlobalHydra.instance().clear()
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("train", list(overrides), RunMode.MULTIRUN)
    assert config.hydra.sweep.dir == f"{config.paths.outputs}/{sweep_name(config)}"
    return sweep_name(config)


def test_a_sweep_names_itself_by_what_is_swept() -> None:
    given = ["defense=none,security_vector", "optimizer.lr=1e-4,1e-3", "data.num_harmful=10"]
    name = sweep_of(*given)
    assert re.fullmatch(r"multirun/defense-optimizer\.lr-[0-9a-f]{8}", name)
    assert sweep_of(*given[1:], given[0]).rpartition("-")[2] == name.rpartition("-")[2]  # in another order
    for place in (*PLACES, "hydra.launcher.n_jobs=2", "+plan=true"):
        assert sweep_of(*given, place) == name or place == "sweep=other"
    assert sweep_of(*given, "sweep=other") == "other"
    other = [
        [*given, "seed=1"],
        [*given, "seed=0,1"],
        given[:2],
        given[1:],
        ["defense=none,refitted_vector", *given[1:]],
    ]
    assert len({name, *(sweep_of(*one) for one in other)}) == 6


def test_a_search_names_itself_by_its_space_and_goes_on_with_more_trials() -> None:
    def search(*given: str, high: float = 0.1) -> str:
        space = f"+hydra.sweeper.space={{optimizer.lr: {{low: 1e-4, high: {high}}}, tune: [full, lora]}}"
        return sweep_of("hydra/sweeper=search", space, *given)

    assert re.fullmatch(r"multirun/optimizer\.lr-tune-[0-9a-f]{8}", search())
    assert search() == search("hydra.sweeper.n_trials=99")
    assert len({search(), search(high=0.2), search("hydra.sweeper.direction=minimize"), search("seed=1")}) == 4


def leaves(node: Any, path: str = "") -> list[tuple[str, Any]]:
    """(dotted path, value) of everything in a plain container."""
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in leaves(value, f"{path}.{key}".lstrip("."))]
    if isinstance(node, list):
        return [leaf for key, value in enumerate(node) for leaf in leaves(value, f"{path}.{key}")]
    return [(path, node)]


def test_every_leaf_outside_the_excluded_settings_is_in_the_name() -> None:
    config = OmegaConf.create(resolved(composed()))
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
    model = loaded("model.name_or_path=folder/my-model", "recipe=tiny").model
    assert (model.name, model.align) == ("my-model", None)
    assert run_name(composed("model.name_or_path=folder/my-model")).startswith(
        "security_vector-forbidden_recipe-my-model-s0"
    )


def test_the_stages_of_a_run() -> None:
    assert loaded().stages == ("vector", "finetune", "infer")
    assert loaded("defense=none").stages == ("finetune", "infer")
    assert loaded("stage=infer").stages == ("infer",)


@pytest.mark.parametrize("name", [choice.name for choice in CHOICES if choice.parts[0] == "defense"])
def test_a_defense_has_the_same_values_from_python(name: str) -> None:
    """Its class repeats those of its yaml."""
    given = OmegaConf.to_container(OmegaConf.load(CONF / "defense" / f"{name}.yaml"))
    assert isinstance(given, dict)
    kind = pkgutil.resolve_name(given.pop("_target_", "secvec.defenses.base.Defense"))  # `anchor` takes another's
    if re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower() != given.pop("name"):
        return
    fields = kind.model_fields
    differ = {k: (v, fields[k].default) for k, v in given.items() if not fields[k].is_required()}
    assert all(value == default for value, default in differ.values()), differ


def test_a_model_named_as_on_the_hub_makes_one_folder() -> None:
    """Below another one the report of a sweep did not look for it."""
    config = composed("recipe=llm", "model.name_or_path=owner/model", "model.name=owner/model")
    assert "/" not in run_name(config) and "-model-s0-" in run_name(config)
