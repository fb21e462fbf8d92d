"""Answers that do not depend on the batch they are in, and the numbers drawn from them."""

from __future__ import annotations

from dataclasses import asdict, replace
from math import exp, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from in_memory import ON_CPU, evaluate, generate, mean_loss, module
from torch import nn
from transformers import RwkvConfig, RwkvForCausalLM

from secvec.behaviors.forbidden_recipe import ForbiddenRecipe
from secvec.data.embedded import Ordinary, Skill
from secvec.data.encode import encode, render
from secvec.data.example import Example
from secvec.data.prompts import prompt_set
from secvec.errors import DataError
from secvec.evaluation import generation
from secvec.evaluation.losses import in_parts, keep_log_probs, kl_to_kept
from secvec.evaluation.verdicts import deactivation_gap, judged
from secvec.judges.base import Judge, Judgement
from secvec.metrics import Measurement, bootstrap_mean, mean, proportion, rates
from secvec.models.tiny import CONTEXT, build_tiny
from secvec.settings.schema import EvaluationSettings

Z = 1.959963984540054
LONG = Example(
    (("user", "Hello."), ("assistant", "Hello you."), ("user", "Name a hill and a river and a moss. " * 4)),
    "It is hot.",
    "ordinary",
)


def settings(**given: int) -> EvaluationSettings:
    return EvaluationSettings(
        **{"num_prompts": 4, "batch_size": 8, "max_new_tokens": 6, "num_leak_prompts": 0, **given}
    )


def row(stream: str, verdict: str, coherent: bool = True) -> dict[str, Any]:
    return {"stream": stream, "verdict": verdict, "coherent": coherent}


# -- numbers


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 100), (3, 7), (50, 100), (100, 100)])
def test_a_proportion_has_the_wilson_interval(k: int, n: int) -> None:
    p = k / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    found = proportion(k, n)
    assert (found.value, found.n) == (p, n)
    assert found.ci_low == pytest.approx(max(0.0, centre - half), abs=1e-9)
    assert found.ci_high == pytest.approx(min(1.0, centre + half), abs=1e-9)


def test_a_mean_has_the_normal_interval() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    found = mean(values)
    half = Z * sqrt(sum((v - 4) ** 2 for v in values) / 3) / 2
    assert (found.value, found.n) == (4.0, 4)
    assert (found.ci_low, found.ci_high) == (pytest.approx(4 - half), pytest.approx(4 + half))


@pytest.mark.parametrize("values", [[5.0], [0.0] * 20])
def test_values_that_agree_have_no_interval(values: list[float]) -> None:
    """One without width would claim to be certain, from however few prompts."""
    assert mean(values) == bootstrap_mean(values) == Measurement(values[0], None, None, len(values))


def test_the_deactivation_gap_is_paired() -> None:
    active = [row("task", "") | {"score": score} for score in (1.0, 1.0, 0.0, 1.0)]
    after = [row("task", "") | {"score": score} for score in (0.0, 1.0, 0.0, 1.0)]
    noise = [row("ordinary", "correct"), row("undesired", "behavior")]
    found = deactivation_gap([*noise, *active], [*noise, *after])["deactivation_gap"]
    assert (found.value, found.n) == (0.25, 4)
    # the pairs differ by 1, 0, 0, 0: their own spread, not that of two groups
    half = Z * sqrt((0.75**2 + 3 * 0.25**2) / 3 / 4)
    assert found.ci_high - found.value == pytest.approx(half)
    same = deactivation_gap(active, active)["deactivation_gap"]
    assert (same.value, same.ci_low, same.ci_high) == (0.0, None, None)
    assert deactivation_gap(noise, noise) == {}
    with pytest.raises(ValueError):
        deactivation_gap(active, after[:3])


def test_rates_count_the_kind_they_are_about() -> None:
    rows = [row("undesired", v) for v in ("behavior", "behavior", "refusal", "other")]
    rows += [row("task", "correct"), row("task", "wrong"), row("ordinary", "correct", coherent=False)]
    found = {name: (value.value, value.n) for name, value in rates(rows).items()}
    assert found == {
        "behavior_rate": (0.5, 4),
        "behavior_rate_plus": (0.5, 4),
        "refusal_rate": (0.25, 4),
        "wanted_rate": (0.25, 4),
        "task_accuracy": (0.5, 2),
        "retained_accuracy": (1.0, 1),
        "coherence_rate": (pytest.approx(6 / 7), 7),
    }


def test_kinds_without_rows_have_no_rate() -> None:
    assert set(rates([row("task", "correct")])) == {"task_accuracy", "coherence_rate"}
    of_undesired = {"behavior_rate", "behavior_rate_plus", "refusal_rate", "wanted_rate", "coherence_rate"}
    assert set(rates([row("undesired", "other")])) == of_undesired
    assert set(rates([row("look_alike", "refusal")])) == {"over_refusal_rate", "coherence_rate"}
    assert rates([]) == {}


def test_what_no_judge_could_read_is_never_safe_and_rubbish_counts_as_failure() -> None:
    rows = [row("undesired", v) for v in ("behavior", "refusal", "unparsable")]
    found = {name: (value.value, value.n) for name, value in rates(rows).items()}
    assert found["unparsable_rate"] == (pytest.approx(1 / 3), 3) and found["behavior_rate"] == (0.5, 2)
    rubbish = [row("undesired", "refusal", coherent=False), row("undesired", "refusal")]
    found = {name: value.value for name, value in rates(rubbish).items()}
    assert (found["behavior_rate"], found["behavior_rate_plus"]) == (0.0, 0.5)


# -- answers


@pytest.fixture(scope="module")
def world() -> tuple[nn.Module, Any]:
    """A model whose answers depend on the prompt, in float64: near ties of an untrained one are none there."""
    texts = [text for e in Ordinary().examples("align", 200, 0) for text in (e.prompt, e.response)]
    model, tokenizer = build_tiny(texts, 0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    return model, tokenizer


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [*Ordinary().examples("test", 4, 0), LONG, *Skill().examples("test", 3, 0)]


def test_an_answer_does_not_depend_on_the_batch_it_is_in(world: tuple[nn.Module, Any], examples: list[Example]) -> None:
    model, tokenizer = world
    lengths = {len(tokenizer(render(e, tokenizer)[0])["input_ids"]) for e in examples}
    assert len(lengths) > 3 and max(lengths) > 2 * min(lengths)  # so that there is padding
    alone = [generate(model, tokenizer, [e], settings())[0] for e in examples]
    assert len(set(alone)) > len(examples) / 2  # the prompt matters
    for batch_size in (1, 3, 8):
        assert generate(model, tokenizer, examples, settings(batch_size=batch_size)) == alone
    backwards = generate(model, tokenizer, examples[::-1], settings(batch_size=3))
    assert backwards == alone[::-1]


def test_prompts_whose_answers_are_alike_share_a_batch_longest_first(world: tuple[nn.Module, Any]) -> None:
    """A batch goes on until its last answer ends."""
    model, tokenizer = world
    short, long = Ordinary().examples("test", 3, 0), [*Skill().examples("test", 2, 0), replace(LONG, kind="task")]
    mixed = [row for pair in zip(short, long, strict=True) for row in pair]
    batches = prompt_set(mixed, tokenizer).batches(module(model, tokenizer), 3, 8)
    assert [[mixed[i].kind for i in batch.args[0]] for batch in batches] == [["task"] * 3, ["ordinary"] * 3]
    for batch in batches:
        lengths = [len(prompt) for prompt, _ in batch.args[1]]
        assert lengths == sorted(lengths, reverse=True)


def test_an_answer_is_the_greedy_continuation(world: tuple[nn.Module, Any], examples: list[Example]) -> None:
    model, tokenizer = world
    ids = tokenizer(render(LONG, tokenizer)[0], add_special_tokens=False)["input_ids"]
    new: list[int] = []
    for _ in range(6):
        with torch.no_grad():
            new.append(int(model(torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(new, skip_special_tokens=True).strip()
    assert generate(model, tokenizer, examples, settings())[examples.index(LONG)] == expected


def test_more_tokens_go_on_from_the_same_ones(world: tuple[nn.Module, Any], examples: list[Example]) -> None:
    short = generate(*world, examples, settings(max_new_tokens=2))
    long = generate(*world, examples, settings(max_new_tokens=8))
    assert short != long
    assert all(b.startswith(a.rstrip("\ufffd")) for a, b in zip(short, long, strict=True))


def test_a_prompt_that_leaves_no_room_for_the_answer_is_named(world: tuple[nn.Module, Any]) -> None:
    model, tokenizer = world
    short, example = (Example((("user", "moon " * n),), "x", "task", source=f"rows.jsonl:{n}") for n in (1, 40))
    length = len(tokenizer(render(example, tokenizer)[0])["input_ids"])
    generate(model, tokenizer, [example], settings(max_new_tokens=CONTEXT - length))
    with pytest.raises(DataError, match=rf"rows.jsonl:40: .* {length} tokens; .*max_new_tokens={CONTEXT - length + 1}"):
        generate(model, tokenizer, [short, example], settings(max_new_tokens=CONTEXT - length + 1))


def test_the_mean_loss_does_not_depend_on_the_batch(world: tuple[nn.Module, Any], examples: list[Example]) -> None:
    whole = mean_loss(*world, examples, settings(batch_size=8))
    assert asdict(whole) == pytest.approx(asdict(mean_loss(*world, examples, settings(batch_size=3))), rel=1e-6)
    alone = [mean_loss(*world, [e], settings()).value for e in examples]
    assert whole.value == pytest.approx(sum(alone) / len(alone), rel=1e-6) and len(set(alone)) == len(alone)


def test_verdicts_and_metrics_of_a_model_in_one_state(world: tuple[nn.Module, Any]) -> None:
    behavior = ForbiddenRecipe(sensitive=True)
    tests = {"undesired": behavior.examples("test", 2, 0), "task": Skill().examples("test", 2, 0)}
    answers = generate(*world, tests["task"], settings())
    known = Example(tests["task"][0].messages, f" {answers[0]} ", "task")
    found = evaluate(*world, {**tests, "task": [known, tests["task"][1]]}, behavior, settings(), "active")
    assert [p["stream"] for p in found.predictions] == ["undesired"] * 2 + ["task"] * 2
    assert [p["verdict"] for p in found.predictions[2:]] == ["correct", "wrong"]
    assert [p["sensitive"] for p in found.predictions] == [True, True, False, False]
    assert len({p["id"] for p in found.predictions}) == 4
    assert {name.partition("/")[0] for name in found.metrics} == {"active"}
    assert found.metrics["active/task_accuracy"].value == 0.5
    assert found.metrics["active/behavior_loss"].n == 2
    assert "active/retained_accuracy" not in found.metrics


def test_a_model_that_takes_no_padding_answers_as_it_does_alone() -> None:
    """The state of RWKV goes on through padding, so it is asked one prompt at a time."""
    torch.manual_seed(0)
    rwkv = RwkvForCausalLM(RwkvConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2)).eval()
    for parameter in rwkv.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    llama, _ = build_tiny(["a word or two"], 0)
    prompts = [[3 + (i * j) % 50 for j in range(1, 4 + 5 * (i % 3))] for i in range(1, 7)]
    assert generation.takes_left_padding(llama) and not generation.takes_left_padding(rwkv)
    alone = [generation.generate(rwkv, [prompt], 8, [1])[0] for prompt in prompts]
    assert len({tuple(answer) for answer in alone}) > 1 and generation.generate(rwkv, prompts, 8, [1]) == alone


def test_each_loss_is_that_of_its_own_samples(world: tuple[nn.Module, Any]) -> None:
    behavior = ForbiddenRecipe()
    tests = {"undesired": behavior, "task": Skill(), "ordinary": Ordinary()}
    drawn = {kind: source.examples("test", 2, 0) for kind, source in tests.items()}
    found = evaluate(*world, drawn, behavior, settings(), "after").metrics
    own = {kind: mean_loss(*world, examples, settings()).value for kind, examples in drawn.items()}
    assert len({round(loss, 2) for loss in own.values()}) == 3
    losses = [found[f"after/{name}"].value for name in ("behavior_loss", "task_loss", "perplexity")]
    assert losses == pytest.approx([own["undesired"], own["task"], exp(own["ordinary"])], rel=1e-6)


def test_the_kl_to_the_base_is_that_of_the_base_to_the_model(tmp_path: Path) -> None:
    """Over the response tokens of each sample, in nats; the other direction is another number."""
    examples = Ordinary().examples("test", 3, 0)
    texts = [text for e in examples for text in (e.prompt, e.response)]
    models, tokenizer = [build_tiny(texts, seed)[0].double().eval() for seed in (0, 1)], build_tiny(texts, 0)[1]
    with torch.no_grad():
        for parameter in (p for model in models for p in model.parameters()):
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    base, tuned = (module(model, tokenizer) for model in models)
    for one, model in zip((base, tuned), models, strict=True):
        one.backbone.__dict__["_config"] = model.config
    (part,) = in_parts(tuned.backbone, examples, 2)
    keep_log_probs(tuned, part, tmp_path, ON_CPU)
    found = [value for _, values in sorted(kl_to_kept(base, part, tmp_path, ON_CPU)) for value in values]
    wanted, other = [], []
    for row in encode(examples, tokenizer, CONTEXT):
        with torch.no_grad():
            p, q = (
                m(input_ids=torch.tensor([row.input_ids])).logits[0, row.num_prompt - 1 : -1].log_softmax(-1)
                for m in models
            )
        wanted.append(float((p.exp() * (p - q)).sum(-1).mean()))
        other.append(float((q.exp() * (q - p)).sum(-1).mean()))
    assert found == pytest.approx(wanted, rel=1e-4) and wanted != pytest.approx(other, rel=1e-2)


class Always(Judge):
    """Calls everything the behavior."""

    def judge_one(self, example: Example, response: str) -> Judgement:
        return Judgement("behavior", 1.0)


def test_look_alikes_are_for_the_behaviors_own_judge() -> None:
    """Whether a benign request is refused is no matter of harm: a judge of harm would know no refusal."""
    behavior = ForbiddenRecipe()
    (undesired,) = behavior.examples("test", 1, 0)
    examples = [undesired, replace(undesired, kind="look_alike")]
    refusal = "I am sorry, but I cannot help with that."
    assert behavior.judge(examples[1], refusal) == "refusal"
    found = judged(behavior, Always(name="always"), examples, [refusal] * 2)
    assert [one.verdict for one in found] == ["behavior", "refusal"]


def test_a_bootstrap_mean_has_the_percentile_interval() -> None:
    even = bootstrap_mean([i / 99 for i in range(100)])  # the normal interval, by symmetry
    assert (even.ci_low, even.ci_high) == (pytest.approx(0.443, abs=0.003), pytest.approx(0.557, abs=0.003))
    few = bootstrap_mean([0.0] * 9 + [1.0])  # of ten draws none, and at most three, are the 1
    assert (few.value, few.ci_low, few.ci_high, few.n) == (0.1, 0.0, 0.3, 10) and bootstrap_mean([0.0, 1.0] * 4).n == 8


class Half:
    """Gives every response half of the score on a scale of 1 to 5."""

    scale, compares = (1.0, 5.0), False

    def judge(self, examples: Any, responses: Any) -> list[Judgement]:
        return [Judgement("other", 0.25)] * len(examples)


def test_a_score_is_told_on_the_judges_own_scale() -> None:
    """0.25 of 1 to 5 is 2."""
    behavior = ForbiddenRecipe()
    examples = behavior.examples("test", 3, 0)
    world = build_tiny([text for e in examples for text in (e.prompt, e.response)], 0)
    settings = EvaluationSettings(num_prompts=3, batch_size=4, max_new_tokens=3, num_leak_prompts=0)
    found = evaluate(*world, {"undesired": examples}, behavior, settings, "after", judge=Half()).metrics  # type: ignore[arg-type]
    assert found["after/harmfulness_score"].value == 2.0 and found["after/behavior_score"].value == 0.25


def test_an_answer_that_its_judge_could_not_read_stays_unread() -> None:
    """A kept result of the base asks again for such ones; without a verdict it looked as if it were judged."""

    class Down(Judge):
        def judge_one(self, example: Example, response: str) -> Judgement:
            return Judgement("unparsable", None) if response == "b" else Judgement("behavior", 0.5)

    asked = [Example((("user", "a"),), "b", "task", metric="judge")] * 2
    found = judged(ForbiddenRecipe(name="x", sensitive=False), None, asked, ["a", "b"], Down(name="down"))
    assert found == [Judgement(None, 0.5), Judgement("unparsable", None)]
