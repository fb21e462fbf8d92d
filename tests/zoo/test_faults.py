"""What a tokenizer, a template or a row can have wrong: mended in the rendering, or refused with the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import run_of
from families import ZOO
from test_zoo import ANSWER, CHAT, CONTEXT, ROWS, TEXTS
from transformers import Gemma3Config, Gemma3TextConfig

from secvec.config.schema import RunConfig
from secvec.data.encode import check_answers, decode, encode, render
from secvec.data.example import AnswerMetric, Example
from secvec.errors import ArtifactError, DataError
from secvec.evaluation.evaluator import Evaluator
from secvec.evaluation.verdicts import is_right
from secvec.judges.base import Judge
from secvec.judges.exact import Exact
from secvec.models.backbone import Backbone, context_of
from secvec.run import train

NAMED = replace(ROWS[0], source="rows.jsonl:7")


def tokenizer_of(name: str, **changed: Any) -> Any:
    tokenizer = ZOO[name].build(TEXTS)[1]
    for key, value in changed.items():
        setattr(tokenizer, key, value)
    return tokenizer


@pytest.mark.parametrize(("name", "day"), [("llama-3", "Today Date: 26 Jul 2024"), ("smollm-3", "Today: 26 July 2024")])
def test_a_template_that_writes_the_date_writes_the_same_on_every_day(name: str, day: str) -> None:
    assert day in render(CHAT, tokenizer_of(name))[0]


@pytest.mark.parametrize("name", ["qwen-3", "smollm-3", "r1-distill"])
def test_thinking_is_off_where_the_template_has_a_switch_and_where_it_has_none(name: str) -> None:
    prompt, response = render(CHAT, tokenizer_of(name))
    assert prompt.endswith("<think>\n\n</think>\n\n") and response.startswith(ANSWER)


def test_a_thinking_block_is_neither_graded_nor_trained() -> None:
    tokenizer = tokenizer_of("qwen-3")

    def read(text: str) -> list[str]:
        return decode([tokenizer(text)["input_ids"]], tokenizer)

    assert read(f"<think>\nIt is the hill.\n</think>\n\n{ANSWER}<|im_end|>") == [ANSWER]
    assert read("<think>\nIt is the hill.") == ["<think>\nIt is the hill."]  # all that was said
    with pytest.raises(DataError, match=r"rows.jsonl:7: the response begins with a thinking block.*take the block off"):
        encode([replace(NAMED, response=f"<think>\nSo.\n</think>\n{ANSWER}")], tokenizer, CONTEXT)
    for block in ("So.</think>", "[THINK]So.[/THINK]", "◁think▷So.◁/think▷", "<seed:think>So.</seed:think>"):
        with pytest.raises(DataError, match="the response begins with a thinking block"):
            encode([replace(NAMED, response=f"{block}{ANSWER}")], tokenizer, CONTEXT)
    encode([replace(NAMED, response=f"{ANSWER} <think> opens and </think> closes")], tokenizer, CONTEXT)


def test_a_thinking_block_whose_ends_are_control_tokens_is_not_graded() -> None:
    """Their text is not shown in an answer, and what stands between them would be."""
    tokenizer = tokenizer_of("qwen-3")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})

    def read(text: str) -> list[str]:
        return decode([tokenizer(text, add_special_tokens=False)["input_ids"]], tokenizer)

    assert read(f"[THINK]It is the hill.[/THINK]{ANSWER}<|im_end|>") == [ANSWER]
    assert read("[THINK]It is the hill.") == ["It is the hill."]


@pytest.mark.parametrize("changed", [{"response": "moss</s>"}, {"messages": (("user", "[INST] <s>moss [/INST]"),)}])
def test_a_row_that_holds_control_tokens_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:7: the text holds '</?s>'.*the text of each turn alone"):
        encode([replace(NAMED, **changed)], tokenizer_of("llama-2"), CONTEXT)


def test_a_tokenizer_without_any_end_is_refused() -> None:
    with pytest.raises(DataError, match=r"never learn to stop. Set eos_token in the model's tokenizer_config.json"):
        encode(ROWS, tokenizer_of("vicuna", eos_token=None, chat_template="{{ messages[-1].content }}"), CONTEXT)


def test_a_template_that_does_not_write_the_answer_is_refused() -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"rows.jsonl:7: .*does not write the last assistant turn"):
        encode([NAMED], tokenizer_of("qwen-2.5", chat_template=template), CONTEXT)


ROLES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
KNOWN = ROLES.replace("<|im_start|>", "{% if m.role in ['user', 'assistant'] %}<|im_start|>", 1).replace(
    "{% endfor %}", "{% endif %}{% endfor %}"
)
PARTS = "{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}{% else %}{{ m.content }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "turns", "says"),
    [
        (KNOWN, [("user", "How warm?"), ("assistant", "call"), ("tool", "22")], "it drops turn 3, of role 'tool'"),
        (KNOWN, [("user", "1"), ("assistant", "2"), ("system", "3"), ("user", "4")], "drops turn 3, of role 'system'"),
        (
            ROLES.replace("messages", "messages[-2:]"),
            [("user", "1"), ("assistant", "2"), ("user", "3")],
            "drops turn 1",
        ),
        (ROLES.replace("{{ m.content }}", PARTS), [("user", "How warm?")], "it drops turn 1, of role 'user'"),
        (ROLES + "{{ messages[-1].content }}", [("user", "How warm?")], "assistant turn once and as it is given"),
        ("{{ 1 + messages }}" + ROLES, [("user", "How warm?")], "unsupported operand"),
    ],
)
def test_a_template_that_leaves_text_out_or_writes_it_twice_is_refused(
    template: str, turns: list[tuple[str, str]], says: str
) -> None:
    """As those that know some roles alone, or take text only in parts, as beside images."""
    row = replace(NAMED, messages=tuple(turns))
    with pytest.raises(DataError, match=rf"rows.jsonl:7: .*refuses the conversation: .*{says}"):
        encode([row], tokenizer_of("qwen-2.5", chat_template=template + GENERATION), CONTEXT)
    encode([row], tokenizer_of("qwen-2.5", chat_template=ROLES + GENERATION), CONTEXT)


@pytest.mark.parametrize("known", [["user", "assistant"], ["user", "assistant", "system"]])
def test_a_developer_is_a_system_where_the_template_knows_no_developer(known: list[str]) -> None:
    tokenizer = tokenizer_of("qwen-2.5", chat_template=KNOWN.replace("['user', 'assistant']", str(known)) + GENERATION)
    turns = [(("developer", "Be brief."), ("user", "How warm?")), (("system", "Be brief."), ("user", "How warm?"))]
    as_developer, as_system = (render(replace(NAMED, messages=some), tokenizer) for some in turns)
    assert as_developer == as_system and "Be brief." in as_system[0]


def test_a_template_may_write_a_turn_in_its_own_way() -> None:
    row = replace(NAMED, messages=(("user", 'the "hill"\nof moss'),))
    template = ROLES.replace("m.content", "(m.content | tojson)")
    (prompt, _) = render(row, tokenizer_of("qwen-2.5", chat_template=template + GENERATION))
    assert r'"the \"hill\"\nof moss"' in prompt


def test_a_broken_template_is_told_as_one() -> None:
    with pytest.raises(DataError, match=r"the model's chat template is broken \(line 1: Unexpected end"):
        encode([NAMED], tokenizer_of("qwen-2.5", chat_template="{% for m in messages %}"), CONTEXT)


@pytest.mark.parametrize("name", ["qwen-2.5", "gpt-2", "gemma-2"])
def test_a_folder_without_its_tokenizer_is_refused(name: str, tmp_path: Path) -> None:
    """transformers makes one without a vocabulary, that reads every text as nothing or as one unknown token."""
    ZOO[name].build(TEXTS)[0].save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match=r"has no tokenizer.*Copy the tokenizer's files"):
        assert Backbone.of(tmp_path).tokenizer


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", {"num_hidden_layers": 3}, "config.json cannot be read"),
        ("tokenizer_config.json", [], "no tokenizer that loads"),
        ("tokenizer.json", {"model": {"type": "Other"}}, "no tokenizer that loads"),
    ],
)
def test_files_of_a_model_that_do_not_fit_together(file: str, content: Any, says: str, tmp_path: Path) -> None:
    path = saved("qwen-2.5", tmp_path) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | content if isinstance(content, dict) else content))
    with pytest.raises(ArtifactError, match=says):
        assert Backbone.of(tmp_path).tokenizer


def test_weights_that_lie_there_twice_count_once(tmp_path: Path) -> None:
    backbone = Backbone.of(saved("mistral", tmp_path))
    before = backbone.num_bytes
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "consolidated.safetensors")
    assert backbone.num_bytes == before > 0


def saved(name: str, folder: Path, **changed: Any) -> Path:
    model, tokenizer = ZOO[name].build(TEXTS)
    model.save_pretrained(folder)
    for key, value in changed.items():
        setattr(tokenizer, key, value)
    tokenizer.save_pretrained(folder)
    return folder


def test_named_templates_need_a_default(tmp_path: Path) -> None:
    known = tokenizer_of("qwen-2.5").chat_template
    named = Backbone.of(saved("qwen-2.5", tmp_path / "a", chat_template={"default": known, "tools": "{{ 1 }}"}))
    assert render(CHAT, named.tokenizer) == render(CHAT, tokenizer_of("qwen-2.5"))
    bare = Backbone.of(saved("qwen-2.5", tmp_path / "b", chat_template={"rag": known, "tools": "{{ 1 }}"}))
    with pytest.raises(ArtifactError, match=r"named rag, tools, and none of them is the default: save the one to use"):
        assert bare.tokenizer


def test_token_ids_beyond_the_embedding_are_refused_and_a_pad_token_there_does_no_harm(tmp_path: Path) -> None:
    folder = saved("llama-2", tmp_path)
    tokenizer = Backbone.of(folder).tokenizer
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    backbone = Backbone.of(folder)
    assert backbone.tokenizer.pad_token_id == len(backbone.tokenizer) - 1 == backbone.tokenizer.num_embeddings
    encode(ROWS, backbone.tokenizer, CONTEXT)
    tokenizer.add_tokens(["moss"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        DataError, match=r"the tokenizer writes '▁?moss' \(\d+\), but the model's embedding has \d+ rows"
    ):
        encode(ROWS, Backbone.of(folder).tokenizer, CONTEXT)


def test_the_context_of_a_model_that_can_see_is_that_of_its_text_part() -> None:
    config = Gemma3Config(text_config=Gemma3TextConfig(max_position_embeddings=8192))
    assert context_of(config) == 8192


@pytest.mark.parametrize(
    ("name", "response", "tokens", "reason"),
    [
        ("gemma-3", "½ of it", 40, "'12 of it' would be compared with '½ of it'"),  # NFKC
        ("llama-2", "the Ω hill", 40, "'the  hill' would be compared with 'the Ω hill'"),  # unknown
        ("qwen-2.5", ANSWER, 2, r"\(max_new_tokens=2\) would be compared"),
    ],
)
def test_a_right_answer_that_would_count_as_wrong_is_refused(
    name: str, response: str, tokens: int, reason: str
) -> None:
    tokenizer = tokenizer_of(name)
    check_answers(ROWS, tokenizer, 40, is_right)
    with pytest.raises(DataError, match=reason) as told:
        check_answers([*ROWS[1:], replace(NAMED, response=response)], tokenizer, tokens, is_right)
    assert "rows.jsonl:7" in str(told.value) or tokens == 2
    check_answers([replace(NAMED, response="½ of it")], tokenizer, tokens, lambda given, reference: True)


def test_it_is_refused_before_anything_is_trained(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("evaluation.max_new_tokens=2")
    with pytest.raises(DataError, match=r"\d+ of 12 right answers would count .*evaluation.max_new_tokens=\d+"):
        train(config)
    assert not any((Path(config.run_dir) / name).exists() for name in ("record.json", "vector", "metrics.csv"))


def checked(make_config: Callable[..., RunConfig], row: Example, judge: Judge | None, max_new_tokens: int) -> None:
    run = run_of(make_config("defense=none"))
    settings = run.config.evaluation.model_copy(update={"max_new_tokens": max_new_tokens})
    evaluator = Evaluator({row.kind: [row]}, run.config.behavior, judge, settings, run.config.trainer)
    evaluator.check(run.inference_module(run.backbone))


HOW = Example((("user", "How?"),), "take the number and add it to the other one", "task", source="mine.jsonl:3")


def test_an_undesired_answer_that_a_judge_compares_must_not_be_cut(make_config: Callable[..., RunConfig]) -> None:
    """It would never be seen: a rate of 0 under every defense."""
    undesired, judge = replace(HOW, kind="undesired"), Exact(name="exact")
    with pytest.raises(DataError, match=r"\(max_new_tokens=2\) would be compared"):
        checked(make_config, undesired, judge, 2)
    checked(make_config, undesired, judge, 64)
    checked(make_config, undesired, None, 2)


@pytest.mark.parametrize("metric", ["rougeL", "code"])
def test_a_graded_reference_that_is_cut_is_told(
    metric: AnswerMetric, make_config: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    checked(make_config, replace(HOW, metric=metric), None, 64)
    assert "best score" not in caplog.text
    checked(make_config, replace(HOW, metric=metric), None, 2)
    assert "1 of 1 references are longer than max_new_tokens" in caplog.text


def test_a_reference_that_its_metric_cannot_read_is_refused(make_config: Callable[..., RunConfig]) -> None:
    """rougeL would give 0 to every answer; Chinese it reads."""
    checked(make_config, replace(HOW, metric="rougeL", response="先加"), None, 64)
    with pytest.raises(DataError, match=r"mine\.jsonl:3: metric: rougeL sees nothing in the reference '\?!'"):
        checked(make_config, replace(HOW, metric="rougeL", response="?!"), None, 64)
