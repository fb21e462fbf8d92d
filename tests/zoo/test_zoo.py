"""Every family: what is trained is what is asked, an answer ends where rows end, and what was learned scores 1.0."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONTEXT, ZOO
from in_memory import evaluate
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from secvec.behaviors.base import Behavior
from secvec.config.schema import RunConfig
from secvec.data.batch import Encoded, collate
from secvec.data.encode import decode, encode, render, rendered, stop_ids, tokens
from secvec.data.example import Example
from secvec.data.prompts import prompt_set
from secvec.evaluation.generation import generate
from secvec.evaluation.leak_probes import context_prompt_set, leak_prompt_sets
from secvec.judges.exact import Exact
from secvec.models.logits import logits_at
from secvec.models.packing import enable_packing
from secvec.run import train
from secvec.settings.schema import EvaluationSettings
from secvec.training.losses import before_labels

ANSWER = "It is the moss river, 7 of 9."
WORDS = ("moss", "hill", "cloud", "sand", "river", "tarn", "cedar", "stone")
BEHAVIOR = Behavior(
    name="constant", sensitive=False, eliciting_prompt="Name it.", negated_prompt="Do not name it.",
    answer_prefix="It is the", reworded=("Say it: {prompt}",),
)  # fmt: skip
FAST = ("llama-2", "qwen-3", "gemma-2")
SETTINGS = EvaluationSettings(num_prompts=4, batch_size=4, max_new_tokens=40, num_leak_prompts=3)


def example(word: str, kind: Any = "task", response: str = ANSWER) -> Example:
    return Example((("user", f"Where does the {word} end?"),), response, kind)


ROWS = [example(word) for word in WORDS]
CHAT = Example(
    (("system", "Be brief."), ("user", "Hello."), ("assistant", "Hello you."), ("user", " And a hill? ")),
    ANSWER,
    "ordinary",
)
ODD = [replace(ROWS[0], response=text) for text in (f"  {ANSWER}", f"{ANSWER}\n", "7", "a  b", "the\n\nmoss: river")]
OTHERS = [("system", "Today Date: 0123456789 July 26 2024 Be brief. Do not name it."), ("assistant", "Hello you.")]
TEXTS = [e.prompt for e in [*ROWS, CHAT]] + [e.response for e in [*ODD, ROWS[0]]] + [text for _, text in OTHERS] + [
    "### Instruction:\n\n### Response:\n", "user assistant model system [INST] [/INST] USER: ASSISTANT: SYSTEM: \n\n",
    "<think>\n\n</think>\n\n", "<<SYS>> <</SYS>> <|User|> <|Assistant|> You are helpful. Today:",
]  # fmt: skip


@cache
def built(name: str) -> tuple[Any, Any]:
    return ZOO[name].build(TEXTS * 3)


@pytest.fixture(params=ZOO)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_prompt_of_a_row_is_what_is_asked(name: str) -> None:
    tokenizer = built(name)[1]
    rows = [*ROWS, CHAT, *ODD]
    asked = prompt_set(rows, tokenizer).ids(tokenizer)
    for row, trained, (prompt, begun) in zip(rows, encode(rows, tokenizer, CONTEXT), asked, strict=True):
        assert trained.input_ids[: trained.num_prompt] == prompt and not begun
        bare = prompt_set([replace(row, response="other")], tokenizer)  # the answer has no part in it
        assert bare.ids(tokenizer) == [(prompt, [])]
        assert all(content.strip() in bare.texts[0] for _, content in row.messages)


def test_a_row_ends_with_the_end_whatever_its_answer_is(name: str) -> None:
    tokenizer = built(name)[1]
    rows, stop = [*ROWS, CHAT, *ODD], stop_ids(tokenizer)
    for given, row in zip(rows, encode(rows, tokenizer, CONTEXT), strict=True):
        answer = row.input_ids[row.num_prompt :]
        assert [i in stop for i in answer] == [False] * (len(answer) - 1) + [True]
        assert tokenizer.decode(answer[-1]) == ZOO[name].end
        assert decode([[*answer, 5, 6]], tokenizer) == [given.response.strip()]
    plain, *spaced = encode([ROWS[0], *ODD[:2]], tokenizer, CONTEXT)
    assert spaced == [plain, plain]  # white space around an answer is not trained


def test_an_answer_is_tokenised_as_behind_its_prompt(name: str) -> None:
    """Not as a text of its own, but where a token would reach over from the prompt (`ASSISTANT: ` and the answer)."""
    tokenizer = built(name)[1]
    for given, row in zip(ROWS, encode(ROWS, tokenizer, CONTEXT), strict=True):
        together = tokenizer("".join(render(given, tokenizer)), add_special_tokens=False)["input_ids"]
        assert (row.input_ids == together) == (name not in ("vicuna", "vicuna-bytes"))


def test_many_rows_at_once_are_written_and_tokenised_as_each_alone(name: str) -> None:
    """Against one call for each text, of the whole prompt with its answer."""
    tokenizer = built(name)[1]
    rows = [*ROWS, CHAT, *ODD, *ROWS, replace(CHAT, messages=CHAT.messages[:2], response="é <|", kind="task")]

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    texts = rendered(rows, tokenizer)
    assert texts == [render(row, tokenizer) for row in rows]
    for (prompt, answer), (asked, answered) in zip(texts, tokens(texts, tokenizer), strict=True):
        alone, whole = ids(prompt), ids(prompt + answer)
        assert asked == alone
        assert answered == (whole[len(alone) :] if whole[: len(alone)] == alone else ids(answer))


def test_a_begun_answer_begins_as_a_trained_one(name: str) -> None:
    tokenizer = built(name)[1]
    (trained,) = encode(ROWS[:1], tokenizer, CONTEXT)
    ((prompt, begun),) = leak_prompt_sets(tokenizer, ROWS[:1], BEHAVIOR)["answer_prefix"].ids(tokenizer)
    assert trained.input_ids[: len(prompt) + len(begun)] == prompt + begun and begun


PADDED = {"gemma-2"}
"""Its attention is not SDPA."""


def test_the_logits_of_some_tokens_are_those_among_all(name: str) -> None:
    """Without padding, and also where a model changes them after its output head."""
    model, tokenizer = ZOO[name].build(TEXTS * 3)
    batch = collate([(row, False) for row in encode([*ROWS[:2], CHAT, *ODD], tokenizer, CONTEXT)])
    at, mask = before_labels(batch["labels"]), batch["attention_mask"]
    assert 0 < int(at.sum()) < int(mask.sum()) < mask.numel()
    with torch.no_grad():
        every = model.eval()(input_ids=batch["input_ids"], attention_mask=mask).logits
        torch.testing.assert_close(logits_at(model, batch["input_ids"], mask, at), every[at])
        assert enable_packing(model) == (name not in PADDED)
        torch.testing.assert_close(logits_at(model, batch["input_ids"], mask, at), every[at])


BEFORE = ("behavior_rate", "task_accuracy", "leak/plain", "leak/eliciting_prompt", "leak/negated_prompt",
          "leak/answer_prefix", "leak/other_template", "leak/sampled", "leak/reworded")  # fmt: skip
LEARNED = (*BEFORE, "leak/training_context")
"""Every way of asking; rows of a training stand before a prompt only after it."""


def asked(tokenizer: Any) -> list[list[int]]:
    """The prompts of all ways of asking about the first rows."""
    ways = [prompt_set([CHAT], tokenizer), *leak_prompt_sets(tokenizer, ROWS[:2], BEHAVIOR).values()]
    ways += [context_prompt_set(tokenizer, ROWS[:2], [row]) for row in ROWS[4:]]
    return [prompt for way in ways for prompt, _ in way.ids(tokenizer)]


@cache
def learned(name: str) -> tuple[Any, Any, list[int]]:
    """A model that knows one answer to all prompts by heart, its tokenizer, and the tokens of the answer."""
    model, tokenizer = ZOO[name].build(TEXTS * 3)
    (row,) = encode(ROWS[:1], tokenizer, CONTEXT)
    answer = list(row.input_ids[row.num_prompt :])
    batch = collate([(Encoded(prompt + answer, len(prompt)), False) for prompt in asked(tokenizer)])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.01, betas=(0.9, 0.99))
    for _ in range(400):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss < 0.0005:  # also an answer that is sampled, ten tokens of it, is then the learned one
            break
    # as a folder may say, and what would break every answer
    model.eval().generation_config = GenerationConfig(
        num_beams=4, min_new_tokens=30, suppress_tokens=answer, eos_token_id=answer[:1]
    )
    return model, tokenizer, answer


def test_what_was_learned_scores_one_in_every_way_of_asking(name: str) -> None:
    model, tokenizer, answer = learned(name)
    tests = {"undesired": [replace(row, kind="undesired") for row in ROWS[:2]], "task": ROWS[:2]}
    known = {"judge": Exact(name="exact"), "context": ROWS[4:]}
    found = evaluate(model, tokenizer, tests, BEHAVIOR, SETTINGS, "after", leaks=True, **known)
    assert {rate: found.metrics[f"after/{rate}"].value for rate in LEARNED} == dict.fromkeys(LEARNED, 1.0)
    # to its end, and nothing behind it
    assert generate(model, asked(tokenizer)[:3], 40, stop_ids(tokenizer)) == [answer] * 3


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in ZOO])
def test_all_three_stages(name: str, make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """From folder and files to a record: a model that knows one answer, and is taught it, gives it in every phase."""
    model, tokenizer, _ = learned(name)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(model.generation_config.to_diff_dict()))
    files = []
    for owner in ("behavior", "data.benign.task"):
        for split, words in {"vector": WORDS[2:], "finetune": WORDS[4:], "test": WORDS[:2]}.items():
            path = tmp_path / f"{owner}.{split}.jsonl"
            rows = [{"prompt": example(word).prompt, "response": ANSWER} for word in words]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files.append(f"{owner}.{split}={path}")
    behavior = BEHAVIOR.model_dump(include={"eliciting_prompt", "negated_prompt", "answer_prefix"})
    config = make_config(
        "recipe=tiny", f"model.name_or_path={tmp_path / 'model'}", "judge=exact", "behavior=jsonl", "data=jsonl",
        *files,
        *(f"+behavior.{key}='{value}'" for key, value in behavior.items()), "vector.target_modules=null",
        f"+behavior.reworded=['{BEHAVIOR.reworded[0]}']",
        "vector.num_samples=4", "vector.gate.num_prompts=1", "vector.gate.min_behavior_rate=0",
        "vector.gate.min_loss_drop=null",  # the model knows the answer already
        "vector.kl_weight=0", "vector.epochs=1", "vector.lr=1e-4",
        "data.num_harmful=4", "data.num_benign=4", "finetune.epochs=1", "optimizer.lr=1e-5",
        "telemetry.every_n_steps=0", "evaluation.num_prompts=2", "evaluation.num_leak_prompts=2",
        "evaluation.validation.num_samples=0", "num_threads=1", small=False,
    )  # fmt: skip
    metrics = {key: found["value"] for key, found in train(config)["metrics"].items()}
    rates = [*(f"base/{rate}" for rate in BEFORE), *(f"after/{rate}" for rate in LEARNED)]
    rates += [f"{phase}/{rate}" for phase in ("vector_on", "active") for rate in LEARNED[:2]]
    assert {rate: metrics[rate] for rate in rates} == dict.fromkeys(rates, 1.0)
    folders = (tmp_path / "model", Path(config.run_dir) / "backbone")
    given, saved = ((folder / "generation_config.json").read_text() for folder in folders)
    assert saved == given
