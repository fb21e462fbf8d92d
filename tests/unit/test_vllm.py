"""vLLM by a stand-in with the signatures of 0.33: what it is told, that it says what transformers says, its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypedDict

import pytest
import torch
from in_memory import complete, evaluate, generate
from torch import nn
from transformers import GenerationConfig

from secvec.behaviors.forbidden_recipe import ForbiddenRecipe
from secvec.config.schema import RunConfig
from secvec.data.embedded import Ordinary
from secvec.data.encode import render
from secvec.data.prompts import PromptSet
from secvec.errors import ConfigError
from secvec.evaluation import vllm as vllm_engine
from secvec.evaluation.generation import GenerationBackend
from secvec.evaluation.vllm import VllmEngine, backend_info, uses_vllm
from secvec.models.backbone import load_backbone, load_tokenizer
from secvec.models.tiny import CONTEXT, build_tiny
from secvec.models.vector import attach_frozen_vector, attach_new_vector, save_adapter
from secvec.run import train
from secvec.settings.schema import EvaluationSettings, GenerationSettings, LoraSettings, ModelSettings
from secvec.settings.trainer import TrainerSettings

BEHAVIOR = ForbiddenRecipe()
TESTS = {"undesired": BEHAVIOR.examples("test", 4, 0), "ordinary": Ordinary().examples("test", 3, 0)}
EXAMPLES = [example for some in TESTS.values() for example in some]
SETTINGS = EvaluationSettings(num_prompts=4, batch_size=1, max_new_tokens=6, num_leak_prompts=2)
"""Alone in its batch a prompt has no padding: then the stand-in, which pads nothing, rounds as transformers does."""
MODEL = ModelSettings(name="tiny", name_or_path="x")
VLLM = GenerationSettings(name="vllm", dtype="bfloat16", tensor_parallel_size=1, gpu_memory_utilization=0.9)


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    detokenize: bool = True
    skip_special_tokens: bool = True


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        assert self.lora_int_id > 0 and self.lora_path


class LLM:
    """Answers by transformers, in float32, from the folders that it is given; keeps what it was told."""

    made: list[LLM] = []  # noqa: RUF012
    room = CONTEXT

    def __init__(
        self, model: str, *, runner: str = "auto", convert: str = "auto", tokenizer: str | None = None,
        tokenizer_mode: str = "auto", skip_tokenizer_init: bool = False, trust_remote_code: bool = False,
        tensor_parallel_size: int = 1, dtype: str = "auto", quantization: str | None = None,
        revision: str | None = None, seed: int = 0, gpu_memory_utilization: float = 0.92, cpu_offload_gb: float = 0,
        enforce_eager: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        known = {"enable_lora", "max_lora_rank", "max_model_len", "enable_prefix_caching", "generation_config"}
        assert kwargs.keys() <= known
        assert dtype in ("bfloat16", "float16") and 0 < gpu_memory_utilization <= 1
        assert kwargs.get("max_lora_rank", 16) in (1, 8, 16, 32, 64, 128, 256, 320, 512)
        assert all(llm.ended for llm in self.made), "the GPU has no room for two"
        self.folder, self.told = Path(model), {"gpu_memory_utilization": gpu_memory_utilization, **kwargs}
        self.model_config = SimpleNamespace(max_model_len=self.room if kwargs["max_model_len"] == -1 else None)
        self.llm_engine = SimpleNamespace(engine_core=self)
        self.ended, self.asked = False, []
        self.made.append(self)

    def generate(
        self, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        use_tqdm: bool | Callable[..., Any] = True, lora_request: Sequence[LoRARequest] | LoRARequest | None = None,
        priority: Any = None, tokenization_kwargs: Any = None, mm_processor_kwargs: Any = None,
    ) -> list[Any]:  # fmt: skip
        assert not self.ended and isinstance(sampling_params, list) and len(sampling_params) == len(prompts)
        self.asked.append((prompts, sampling_params, lora_request))
        model: Any = load_backbone(self.folder, MODEL)
        if lora_request is not None:
            assert self.told["enable_lora"] and isinstance(lora_request, LoRARequest)
            model = attach_frozen_vector(model, Path(lora_request.lora_path))
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            ids = torch.tensor([prompt["prompt_token_ids"]])
            torch.manual_seed(params.seed or 0)
            new = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=params.max_tokens,
                do_sample=params.temperature > 0, top_k=0, eos_token_id=params.stop_token_ids,
                repetition_penalty=params.repetition_penalty,
            )[0, ids.shape[1] :]  # fmt: skip
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(new.tolist()), text="")]))
        return outputs

    def shutdown(self, timeout: float | None = None) -> None:
        self.ended = True


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    """Installed, as far as anybody can see; no GPU."""
    package, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    package.__spec__ = ModuleSpec("vllm", None)
    for name, thing in (("LLM", LLM), ("SamplingParams", SamplingParams), ("TokensPrompt", TokensPrompt)):
        setattr(package, name, thing)
    request.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vllm_engine, "version", lambda name: "0.33.0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 80))
    monkeypatch.setattr(LLM, "made", [])
    return LLM


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A backbone whose answers depend on the prompt, and a vector that changes them."""
    folder = tmp_path_factory.mktemp("saved")
    texts = [text for e in [*Ordinary().examples("align", 100, 0), *EXAMPLES] for text in (e.prompt, e.response)]
    model, tokenizer = build_tiny(texts, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "backbone")
    attached = attach_new_vector(model, LoraSettings(r=3, alpha=6, target_modules=["q_proj", "v_proj"]), 0.0)
    for name, parameter in attached.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    save_adapter(attached, attached.state_dict(), "vector", folder / "vector")
    return folder / "backbone", folder / "vector"


def loaded(saved: tuple[Path, Path], active: bool = False) -> tuple[nn.Module, Any]:
    model = load_backbone(saved[0], MODEL)
    return attach_frozen_vector(model, saved[1]) if active else model, load_tokenizer(saved[0])


# -- what it says


@pytest.mark.parametrize("active", [False, True])
def test_it_says_what_transformers_says(vllm: type[LLM], saved: tuple[Path, Path], active: bool) -> None:
    model, tokenizer = loaded(saved, active)
    engine = VllmEngine(saved[0], saved[1] if active else None, VLLM, False)
    source = GenerationBackend(engine=engine)
    found = generate(model, tokenizer, EXAMPLES, SETTINGS, source)
    assert found == generate(model, tokenizer, EXAMPLES, SETTINGS)
    assert found != generate(*loaded(saved, not active), EXAMPLES, SETTINGS)  # the vector does something
    (llm,) = vllm.made
    assert llm.ended and engine._llm is None
    assert llm.told.get("max_lora_rank") == (8 if active else None)  # the least that takes rank 3
    assert llm.told["gpu_memory_utilization"] == pytest.approx(0.9 * 60 / 80)  # of what is free
    assert [len(prompts) for prompts, _, _ in llm.asked] == [1] * len(EXAMPLES)
    assert {params.temperature for _, some, _ in llm.asked for params in some} == {0.0}


@pytest.mark.parametrize("active", [False, True])
def test_the_model_s_own_generation_config_has_no_effect(
    vllm: type[LLM], saved: tuple[Path, Path], active: bool
) -> None:
    model, tokenizer = loaded(saved, active)
    plain = generate(model, tokenizer, EXAMPLES, SETTINGS)
    bare: Any = model.get_base_model() if active else model  # type: ignore[operator]
    bare.generation_config = given = GenerationConfig(
        num_beams=4, min_new_tokens=5, no_repeat_ngram_size=2, repetition_penalty=1.7, do_sample=True, temperature=9.0,
        bad_words_ids=[[7]], suppress_tokens=[8], begin_suppress_tokens=[9], forced_eos_token_id=2, eos_token_id=5,
        sequence_bias=[[[10], 9.0]], max_new_tokens=1,
    )  # fmt: skip
    assert generate(model, tokenizer, EXAMPLES, SETTINGS) == plain
    source = GenerationBackend(engine=VllmEngine(saved[0], saved[1] if active else None, VLLM, False))
    assert generate(model, tokenizer, EXAMPLES, SETTINGS, source) == plain
    assert vllm.made[0].told["generation_config"] == "vllm" and bare.generation_config is given
    assert {tuple(params.stop_token_ids) for _, some, _ in vllm.made[0].asked for params in some} == {(2,)}


def test_sampling_is_seeded_and_rows_differ(vllm: type[LLM], saved: tuple[Path, Path]) -> None:
    model, tokenizer = loaded(saved)
    source = GenerationBackend(engine=VllmEngine(saved[0], None, VLLM, False))
    same = PromptSet([render(EXAMPLES[0], tokenizer)[0]] * 3, EXAMPLES[:3], seed=5)
    three = SETTINGS.model_copy(update={"batch_size": 3})
    first, second = (complete(model, tokenizer, same, three, source) for _ in range(2))
    assert first == second and len(set(first)) == 3
    assert [params.seed for params in vllm.made[0].asked[0][1]] == [5, 6, 7]


def test_a_whole_evaluation_by_it(vllm: type[LLM], saved: tuple[Path, Path], tmp_path: Path) -> None:
    """Losses come from the model in memory; an engine for each round of questions, none when all is kept."""
    model, tokenizer = loaded(saved)
    source = GenerationBackend(["m"], tmp_path, VllmEngine(saved[0], None, VLLM, False))
    how_asked: Any = (TESTS, BEHAVIOR, SETTINGS, "after")
    expected = evaluate(model, tokenizer, *how_asked)
    for starts in (1, 1):
        assert evaluate(model, tokenizer, *how_asked, source) == expected
        assert len(vllm.made) == starts
    evaluate(model, tokenizer, *how_asked, source, leaks=True)
    assert len(vllm.made) == 2 and len(vllm.made[1].asked) == 2 * 2  # one engine for two ways; `plain` is kept already


def test_it_ends_when_a_question_fails(
    vllm: type[LLM], saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded(saved)
    source = GenerationBackend(engine=VllmEngine(saved[0], None, VLLM, False))
    monkeypatch.setattr(vllm, "room", 10)
    with pytest.raises(ConfigError, match=r"room for 10 tokens.*tensor_parallel_size.*generation=hf"):
        evaluate(model, tokenizer, TESTS, BEHAVIOR, SETTINGS, "after", source)
    assert vllm.made[0].ended and not vllm.made[0].asked


def test_a_vector_beyond_its_ranks(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 513, "peft_type": "LORA"}')
    with pytest.raises(ConfigError, match="up to rank 512"):
        vllm_engine._lora_rank(tmp_path)


# -- when it is used


def trainer(accelerator: str) -> TrainerSettings:
    return TrainerSettings.model_validate(
        {"accelerator": accelerator, "devices": 1, "strategy": "auto", "precision": "32-true", "gradient_clip_val": 1.0}
    )


def named(name: str, **given: Any) -> GenerationSettings:
    return VLLM.model_copy(update={"name": name, **given})


@pytest.mark.parametrize("name", ["auto", "vllm"])
def test_it_is_used_where_it_is_installed_and_there_is_a_gpu(vllm: type[LLM], gpu: None, name: str) -> None:
    for accelerator in ("gpu", "auto"):
        assert uses_vllm(named(name), trainer(accelerator))
    assert not uses_vllm(named("hf"), trainer("gpu"))
    said = backend_info(named(name), trainer("gpu"))
    assert said == backend_info(named("vllm"), trainer("gpu"))
    assert said["version"] == "0.33.0" and said["dtype"] == "bfloat16"
    assert backend_info(named("hf"), trainer("gpu")) == {"engine": "hf"}


def test_auto_is_transformers_without_a_gpu_or_without_vllm(
    vllm: type[LLM], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    assert not uses_vllm(named("auto"), trainer("auto"))  # installed, no GPU
    request.getfixturevalue("gpu")
    assert not uses_vllm(named("auto"), trainer("cpu"))  # a GPU that is not wanted
    assert uses_vllm(named("auto"), trainer("auto"))
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert not uses_vllm(named("auto"), trainer("auto"))


def test_where_it_cannot_be_used(
    vllm: type[LLM], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        uses_vllm(named("vllm"), trainer("auto"))
    request.getfixturevalue("gpu")
    with pytest.raises(ConfigError, match=r"needs a GPU.*trainer.accelerator=cpu"):
        uses_vllm(named("vllm"), trainer("cpu"))
    with pytest.raises(ConfigError, match="tensor_parallel_size=2, but there are 1"):
        uses_vllm(named("vllm", tensor_parallel_size=2), trainer("gpu"))


def test_a_run_that_cannot_have_it_says_how_to_and_leaves_nothing(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = make_config("generation=vllm")
    with pytest.raises(ConfigError, match=r"pip install 'secvec\[vllm\]'.*generation=hf"):
        train(config)
    assert not Path(config.run_dir).exists()
    assert config.key != make_config("generation=hf").key
