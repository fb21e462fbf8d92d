"""Answers that are cut off and gone on with: only what is missing is asked, and all are those of an undisturbed run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import run_of
from in_memory import IN_MEMORY, InMemory, complete, generate
from torch import nn

from secvec.config.schema import RunConfig
from secvec.data.embedded import Ordinary, Skill
from secvec.data.example import Example
from secvec.data.prompts import Answer, PromptSet
from secvec.errors import ArtifactError
from secvec.evaluation import generation
from secvec.evaluation.answer_cache import KeptAnswers, kept_result
from secvec.evaluation.generation import GenerationBackend
from secvec.evaluation.verdicts import EvaluationResult
from secvec.metrics import Measurement
from secvec.models.backbone import Backbone
from secvec.models.tiny import build_tiny
from secvec.models.vector import attach_new_vector, save_adapter
from secvec.module import SecVecModule
from secvec.runs.folder import ANSWERS, RunFolder
from secvec.runs.record import Record
from secvec.settings.schema import EvaluationSettings, LoraSettings
from secvec.stages import STAGES
from secvec.stages.infer import _can_be_read

SETTINGS = EvaluationSettings(num_prompts=8, batch_size=3, max_new_tokens=6, num_leak_prompts=0)
EXAMPLES = [*Ordinary().examples("test", 5, 0), *Skill().examples("test", 5, 0)]
BATCHES = 4  # of 3, 3, 3 and 1


@pytest.fixture(scope="module")
def world() -> tuple[nn.Module, Any]:
    """In float32, where another batch would be another rounding."""
    texts = [text for e in Ordinary().examples("align", 200, 0) for text in (e.prompt, e.response)]
    return build_tiny(texts, 0)


class Asked:
    """Counts the batches that the model is asked, and stops before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.batches: list[Any] = []
        self.stop_at: int | None = None
        real = generation.generate

        def answer(model: Any, prompts: Sequence[Any], *rest: Any) -> Any:
            if len(self.batches) == self.stop_at:
                raise KeyboardInterrupt
            self.batches.append([tuple(p) for p in prompts])
            return real(model, prompts, *rest)

        monkeypatch.setattr(generation, "generate", answer)

    def during(self, ask: Callable[[], Any], stop_at: int | None = None) -> int:
        """How many batches `ask` asks."""
        self.batches, self.stop_at = [], stop_at
        if stop_at is None:
            ask()
        else:
            with pytest.raises(KeyboardInterrupt):
                ask()
        return len(self.batches)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


@pytest.mark.parametrize("seed", [None, 3])
def test_what_was_cut_off_goes_on_and_says_the_same(
    world: tuple[nn.Module, Any], asked: Asked, tmp_path: Path, seed: int | None
) -> None:
    asked_for = PromptSet([f"{e.prompt} is" for e in EXAMPLES], EXAMPLES, seed)

    def ask(source: GenerationBackend) -> list[str]:
        return complete(*world, asked_for, SETTINGS, source)

    whole = ask(IN_MEMORY)
    every = list(asked.batches)
    assert len(every) == BATCHES and len(set(whole)) > 3
    source = GenerationBackend(["a model"], tmp_path)
    assert asked.during(lambda: ask(source), stop_at=2) == 2
    assert asked.during(lambda: ask(source)) == BATCHES - 2
    assert asked.batches == every[2:]  # the very batches that an undisturbed run asks
    assert ask(source) == whole
    assert asked.during(lambda: ask(source)) == 0


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_torn_last_line_is_one_batch_less(
    world: tuple[nn.Module, Any], asked: Asked, tmp_path: Path, cut: int
) -> None:
    source = GenerationBackend(["a model"], tmp_path)
    whole = generate(*world, EXAMPLES, SETTINGS, source)
    file = tmp_path / "0.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-cut])
    again: list[str] = []
    assert asked.during(lambda: again.extend(generate(*world, EXAMPLES, SETTINGS, source))) == 1
    assert again == whole and file.read_bytes() == content


def test_a_file_that_is_damaged_elsewhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_text('["a", [["x", false]]]\nnonsense\n["b", [["y", false]]]\n')
    with pytest.raises(ArtifactError, match=r"0.jsonl is damaged .*: remove it"):
        KeptAnswers(tmp_path / "0.jsonl")


OTHER: dict[str, Callable[[GenerationBackend, list[Example], EvaluationSettings], tuple[Any, Any, Any]]] = {
    "model": lambda source, examples, some: (replace(source, identity=["another model"]), examples, some),
    "prompts": lambda source, examples, some: (source, examples[1:], some),
    "length": lambda source, examples, some: (source, examples, some.model_copy(update={"max_new_tokens": 7})),
    "batches": lambda source, examples, some: (source, examples, some.model_copy(update={"batch_size": 4})),
}


@pytest.mark.parametrize("changed", OTHER)
def test_answers_to_something_else_are_not_taken(
    world: tuple[nn.Module, Any], asked: Asked, tmp_path: Path, changed: str
) -> None:
    source = GenerationBackend(["a model"], tmp_path)
    generate(*world, EXAMPLES, SETTINGS, source)
    other, examples, some = OTHER[changed](source, EXAMPLES, SETTINGS)
    expected = generate(*world, examples, some)
    number = len(range(0, len(examples), some.batch_size))
    found: list[str] = []
    assert asked.during(lambda: found.extend(generate(*world, examples, some, other))) == number
    assert found == expected


def test_sampled_answers_are_not_the_greedy_ones(world: tuple[nn.Module, Any], asked: Asked, tmp_path: Path) -> None:
    source, texts = GenerationBackend(["a model"], tmp_path), [e.prompt for e in EXAMPLES]
    for seed in (None, 0, 1):
        ask = lambda seed=seed: complete(*world, PromptSet(texts, EXAMPLES, seed), SETTINGS, source)  # noqa: E731
        assert asked.during(ask) == BATCHES and asked.during(ask) == 0


def test_without_a_run_folder_nothing_is_written(
    world: tuple[nn.Module, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (generate(*world, EXAMPLES, SETTINGS) for _ in range(2))
    assert first == second and list(tmp_path.iterdir()) == []


# -- what a model is known by


def test_other_weights_or_another_vector_are_another_model(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config, texts = make_config(), ["moon hill river"]

    def saved(seed: int) -> Backbone:
        folder = tmp_path / f"model-{seed}"
        for part in build_tiny(texts, seed):
            part.save_pretrained(folder)
        return Backbone(folder, config.model)

    def vector(alpha: float) -> Path:
        lora = LoraSettings(r=2, alpha=alpha, target_modules=["q_proj"])
        model = attach_new_vector(build_tiny(texts, 0)[0], lora, 0.0)
        for name, parameter in model.named_parameters():
            parameter.data.fill_(0.5) if "lora_" in name else None
        save_adapter(model, model.state_dict(), "vector", tmp_path / f"vector-{alpha}")
        return tmp_path / f"vector-{alpha}"

    run, base, known = run_of(config), saved(0), []
    for one, adapter in ((base, None), (saved(1), None), (base, vector(4)), (base, vector(8))):
        known.append(run.inference_module(one, adapter).generation.identity)
    assert len({str(identity) for identity in known}) == 4
    assert run.inference_module(saved(0)).generation.identity == known[0]
    assert run.inference_module(base).generation.folder == Path(config.run_dir) / ANSWERS


def test_a_run_folder_keeps_answers_until_it_ends_well(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", Record(key="key"))
    with pytest.raises(KeyboardInterrupt), folder.running():
        KeptAnswers(folder.path / ANSWERS / "0.jsonl").add("a", [Answer("x", False)])
        raise KeyboardInterrupt
    assert KeptAnswers(folder.path / ANSWERS / "0.jsonl").get("a") == [Answer("x", False)]
    with folder.running():
        pass
    assert not (folder.path / ANSWERS).exists()


def test_a_stage_that_is_forced_to_run_again_forgets_them(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", Record(key="key"))
    KeptAnswers(folder.path / ANSWERS / "0.jsonl").add("a", [Answer("x", False)])
    folder.forget(["finetune"], [])
    assert not (folder.path / ANSWERS).exists()


def test_an_answer_that_fills_the_context_is_no_row(world: tuple[Any, Any]) -> None:
    """The end of the turn would not fit behind it; it is left out of the perplexity, and the run goes on."""
    asked = Example((("user", "Say it."),), "", "undesired")
    with_context = InMemory(*world)
    with_context.__dict__["context"] = 40
    answered = SecVecModule("infer", with_context)
    taken = [_can_be_read(replace(asked, response="word " * n), answered) for n in range(1, 40)]
    assert taken[0] and not taken[-1] and sorted(taken, reverse=True) == taken


def test_verdicts_that_could_not_be_read_are_not_kept(tmp_path: Path) -> None:
    """The judge may give them the next time; the base's are shared by all later runs."""
    verdicts = iter(["unparsable", "behavior", "never asked"])

    def evaluate() -> EvaluationResult:
        return EvaluationResult({}, [{"phase": "base", "verdict": next(verdicts)}])

    path = tmp_path / "base.json"
    found = [kept_result(path, evaluate).predictions[0]["verdict"] for _ in range(3)]
    assert found == ["unparsable", "behavior", "behavior"]


def test_metrics_of_an_earlier_try_go(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", Record(key="key"))
    folder.record.metrics = {
        name: Measurement(0.3) for name in ("after/unparsable_rate", "gate/behavior_rate", "drift")
    }
    folder.drop_metrics(STAGES["infer"].measures)
    assert sorted(folder.record.metrics) == ["drift", "gate/behavior_rate"]


def test_a_module_without_a_folder_keeps_no_answers() -> None:
    """The module may be trained before it is asked again."""
    kept = KeptAnswers(None)
    kept.add("a", [Answer("x", False)])
    assert kept.get("a") is None
