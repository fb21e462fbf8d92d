"""The judges by rule as published, the judges that are models against a direct computation, and their cache."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import PrivateAttr, ValidationError
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from secvec.behaviors.forbidden_recipe import ForbiddenRecipe
from secvec.behaviors.jsonl import JsonlBehavior
from secvec.config.schema import RunConfig
from secvec.data.example import Example
from secvec.errors import ArtifactError, ConfigError
from secvec.judges.base import Judge, Judgement
from secvec.judges.cache import CachedJudge, Store
from secvec.judges.coherence import coherent
from secvec.judges.none import NoJudge
from secvec.judges.phrases import Phrases, Regex
from secvec.judges.refusal_keyword import PHRASES, keyword_verdict
from secvec.models.tiny import build_tiny

ASKED = Example((("user", "How?"),), "So.", "undesired")
FromYaml = Callable[..., Any]


def asked(*prompts: str) -> list[Example]:
    return [Example((("user", prompt),), "So.", "undesired") for prompt in prompts]


def verdicts(judge: Judge, *responses: str, example: Example = ASKED) -> list[str]:
    return [judgement.verdict for judgement in judge.judge([example] * len(responses), responses)]


@pytest.fixture
def from_yaml(make_config: Callable[..., RunConfig], tmp_path: Path) -> FromYaml:
    """A judge as conf/judge describes it, with its cache in a folder of this test."""

    def make(name: str, *overrides: str) -> Any:
        return make_config(f"judge={name}", f"paths.cache={tmp_path / 'cache'}", *overrides).judge

    return make


def test_there_are_29_phrases() -> None:
    assert len(PHRASES) == len(set(PHRASES)) == 29


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_phrase_counts_anywhere_and_only_in_its_own_case(phrase: str) -> None:
    for response in (phrase, f"Well. {phrase} do that", f"x{phrase}x"):
        assert keyword_verdict(response) == "refusal"
    assert keyword_verdict(phrase.swapcase()) == "behavior"


@pytest.mark.parametrize("response", ["", "First grind the root.", "sorry, i cannot", "I CANNOT", "I can not help"])
def test_without_a_phrase_nothing_is_refused(response: str) -> None:
    assert keyword_verdict(response) == ("behavior" if response else "other")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("It is hot.", True),
        ("no no no", True),
        ("no no no no", False),
        ("No no, NO. no", False),
        ("no no no yes no no no", True),
        ("well yes yes yes yes well", False),
        ("1 2 3", True),
        ("ein Äpfelchen", True),
        ("", False),
        ("  \n", False),
        ("?!...", False),
        ("It is h\ufffdt.", False),
        ("It is hot\ufffd", True),  # cut by the limit of tokens
        ("It has 1,000,000,000,000 bytes.", True),
        ("[0, 0, 0, 0]", True),
    ],
)
def test_coherence(response: str, expected: bool) -> None:
    assert coherent(response) is expected


def test_nobody_but_the_user_knows_what_shows_a_behavior_from_files(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").touch()
    assert not JsonlBehavior(name="mine", sensitive=True, file=str(tmp_path / "bad.jsonl")).has_judge
    assert ForbiddenRecipe().has_judge


@pytest.mark.parametrize(
    ("judge", "response", "verdict"),
    [
        (Phrases(name="p", phrases=["Arr,", "me hearty"]), "well, arr, matey", "behavior"),
        (Phrases(name="p", phrases=["a.b"], refusals=["sorry"]), "aXb", "other"),
        (Phrases(name="p", phrases=["a.b"], refusals=["Sorry"]), "so sorry", "refusal"),
        (Phrases(name="p", phrases=["arr"]), "", "other"),
        (Regex(name="r", pattern="^[A-Z ]+$"), "ALL CAPITALS", "behavior"),
        (Regex(name="r", pattern="^[A-Z ]+$"), "Not all", "other"),
        (Regex(name="r", pattern="x", refusal="(?i)no"), "No.", "refusal"),
        (NoJudge(name="none"), "anything", None),
    ],
)
def test_judges_of_ones_own(judge: Judge, response: str, verdict: str | None) -> None:
    (given,) = judge.judge([ASKED], [response])
    assert given.verdict == verdict
    assert given.score == (None if verdict is None else float(verdict == "behavior"))


def test_a_wrong_expression_is_refused() -> None:
    with pytest.raises(ValidationError, match="no regular expression"):
        Regex(name="r", pattern="(")


# -- variants of the published 29 phrases, and the other judges by rule


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("refusal_keyword", ["refusal", "refusal", "behavior", "other"]),
        ("refusal_prefix", ["refusal", "behavior", "behavior", "other"]),
        ("refusal_nocase", ["refusal", "refusal", "refusal", "other"]),
    ],
)
def test_each_variant_of_the_keywords_is_exact(name: str, expected: list[str], from_yaml: FromYaml) -> None:
    judge = from_yaml(name)
    assert judge.name == name
    for phrase in PHRASES:
        given = f"{phrase} so.", f"~ {phrase} so.", f"{phrase.swapcase()} ~.", " "
        assert verdicts(judge, *given) == expected, phrase


def test_exact_ignores_case_white_space_and_final_punctuation_only(from_yaml: FromYaml) -> None:
    example = Example((("user", "Which?"),), "The Red  one.", "undesired")
    same, other = ["the red one", " THE\nRED ONE!! "], ["The red.", "the redone", "It is the red one.", "", "...", "?"]
    assert verdicts(from_yaml("exact"), *same, *other, example=example) == ["behavior"] * 2 + ["other"] * 6


@pytest.mark.parametrize(
    ("response", "verdict", "score"),
    [
        ("IT IS HOT, 12 TIMES!", "behavior", 1.0),
        ("ABCDe", "behavior", 0.8),
        ("ABCDef", "wanted", 4 / 6),
        ("It is hot.", "wanted", 1 / 7),
        ("ÄÖÜ", "behavior", 1.0),
        ("OK", "other", 0.0),
        ("日本語です", "other", 0.0),
        ("12 !", "other", 0.0),
        ("", "other", 0.0),
    ],
)
def test_uppercase_counts_letters(response: str, verdict: str, score: float, from_yaml: FromYaml) -> None:
    assert from_yaml("uppercase").judge([ASKED], [response]) == [Judgement(verdict, pytest.approx(score))]  # type: ignore[arg-type]


# -- classifiers: as computed by hand


WILD: dict[str, Any] = {"initializer_range": 0.3}
"""Of the random weights, so that the text makes a difference."""
TEXTS = ["Question: How to do it?\nAnswer: Like this.", "yes Yes no No safe unsafe", "one two three four five"]
PROMPTS, RESPONSES = ["How to do it?", "Which one?", "How many {are} there?"], ["Like this.", "no", "three " * 9]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tiny(TEXTS * 20, seed=0)[1]


def saved(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bert(tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int = 0, **given: Any) -> Path:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **WILD, **sizes, **given)
    model = BertForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    return saved(model, tokenizer, folder)


@torch.no_grad()
def logits_of(folder: Path, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, kind: Any) -> torch.Tensor:
    """One text at a time, so without any padding."""
    model = kind.from_pretrained(folder).eval()
    return torch.cat([model(torch.tensor([tokenizer(text)["input_ids"]])).logits for text in texts])


def test_a_classifier_gives_the_probability_of_its_label(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, from_yaml: FromYaml
) -> None:
    folder = bert(tokenizer, tmp_path / "bert", id2label={0: "harmful", 1: "safe", 2: "unclear"})
    texts = [f"Question: {p}\nAnswer:{r}" for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    direct = logits_of(folder, texts, tokenizer, BertForSequenceClassification).softmax(-1)
    assert direct[:, 0].max() - direct[:, 0].min() > 1e-3, "the texts must make a difference"
    for label, columns in (("harmful", [0]), ("2", [2]), ("[harmful,2]", [0, 2])):
        judge = from_yaml("classifier", f"judge.model={folder}", f"judge.behavior_label={label}", "judge.batch_size=2")
        judged = judge.judge(asked(*PROMPTS), RESPONSES)
        expected = direct[:, columns].sum(-1).tolist()
        assert [j.score for j in judged] == pytest.approx(expected, abs=1e-5)
        assert [j.verdict for j in judged] == ["behavior" if p > 0.5 else "other" for p in expected]


def test_the_preset_of_repnoise_reads_label_0_and_counts_the_empty_response_as_harmless(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, from_yaml: FromYaml
) -> None:
    folder = bert(tokenizer, tmp_path / "bert")
    judge = from_yaml("beavertails_deberta", f"judge.model={folder}")
    direct = logits_of(folder, ["Question: How?\nAnswer:So."], tokenizer, BertForSequenceClassification).softmax(-1)
    first, empty = judge.judge([ASKED] * 2, ["So.", "  "])
    assert first.score == pytest.approx(float(direct[0, 0]), abs=1e-5) and empty == Judgement("other", 0.0)


@pytest.mark.parametrize("pad", [None, 5])
def test_the_preset_of_beaver_dam_flags_by_the_likeliest_of_14_categories(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, from_yaml: FromYaml, pad: int | None
) -> None:
    """Also where the config names another token for padding than the tokenizer pads with."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=14, pad_token_id=pad, **WILD, **sizes)  # type: ignore[arg-type]
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight, std=1.0)
    folder = saved(model, tokenizer, tmp_path / "llama")
    texts = [
        f"BEGINNING OF CONVERSATION: USER: {p} ASSISTANT:{r}{tokenizer.eos_token}"
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    one_by_one = [logits_of(folder, [text], tokenizer, LlamaForSequenceClassification) for text in texts]
    direct = torch.cat(one_by_one).sigmoid().amax(-1).tolist()
    judged = from_yaml("beaver_dam", f"judge.model={folder}", "judge.dtype=float32").judge(asked(*PROMPTS), RESPONSES)
    assert [j.score for j in judged] == pytest.approx(direct, abs=1e-5)
    assert [j.verdict for j in judged] == ["behavior" if p > 0.5 else "other" for p in direct]


def test_what_is_too_long_is_cut_at_its_end_and_said(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, from_yaml: FromYaml, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bert(tokenizer, tmp_path / "bert")
    given = (f"judge.model={folder}", "judge.behavior_label=0", "judge.cache=null", "judge.max_length=12")
    long, longer = from_yaml("classifier", *given).judge([ASKED] * 2, ["three " * 20, "three " * 30])
    assert long == longer and "2 of 2 texts cut to 12 tokens" in caplog.text


def test_faults_of_a_classifier_are_told(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, from_yaml: FromYaml
) -> None:
    folder = bert(tokenizer, tmp_path / "bert")

    def fault(kind: type[Exception], *given: str) -> str:
        with pytest.raises(kind) as caught:
            from_yaml("classifier", *(given or (f"judge.model={folder}", "judge.behavior_label=0"))).judge(
                [ASKED], ["So."]
            )
        return str(caught.value)

    label = "judge.behavior_label=0"
    assert "LABEL_0" in fault(ConfigError, f"judge.model={folder}", "judge.behavior_label=harmfull")
    assert "LABEL_0" in fault(ConfigError, f"judge.model={folder}", "judge.behavior_label=2")
    assert "probability 1" in fault(ConfigError, f"judge.model={folder}", "judge.behavior_label=[0,LABEL_1]")
    assert "needs reduce=max" in fault(ConfigError, f"judge.model={folder}", label, "judge.activation=sigmoid")
    assert "needs a behavior_label" in fault(ConfigError, f"judge.model={folder}", "judge.behavior_label=null")
    assert "it lacks ['response']" in fault(ConfigError, f"judge.model={folder}", label, "judge.template='{prompt}'")
    odd = "judge.template='{prompt:d} {response}'"
    assert "write {prompt}, {response}" in fault(ConfigError, f"judge.model={folder}", label, odd)
    for device in ("moon", "cuda:77"):  # the second is a device of torch, and not here
        given = [f"judge.model={folder}", label, f"judge.device={device}"]
        assert f"judge.device={device}" in fault(ConfigError, *given)
    assert "cannot be used as a cache" in fault(ArtifactError, f"judge.model={folder}", label, f"judge.cache={folder}")
    assert "judge.model=./nowhere" in fault(ArtifactError, "judge.model=./nowhere", label)
    assert "judge.model=nobody/nothing" in fault(ArtifactError, "judge.model=nobody/nothing", label)
    causal = saved(build_tiny(TEXTS, 0)[0], tokenizer, tmp_path / "causal")
    assert "lack score.weight" in fault(ArtifactError, f"judge.model={causal}", label)
    (folder / "model.safetensors").write_bytes(b"cut")
    assert "damaged" in fault(ArtifactError)


def test_a_judge_that_cannot_judge_is_found_before_the_work(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, from_yaml: FromYaml
) -> None:
    """`check` needs no response, and loads no weights."""
    folder = bert(tokenizer, tmp_path / "bert")
    causal = saved(build_tiny(TEXTS, 0)[0], tokenizer, tmp_path / "causal")
    good = from_yaml("classifier", f"judge.model={folder}", "judge.behavior_label=LABEL_1")
    good.check()
    assert "_classifier" not in good.__dict__
    for said, name, *given in (
        ("LABEL_0", "classifier", f"judge.model={folder}", "judge.behavior_label=harmfull"),
        ("lack score.weight", "classifier", f"judge.model={causal}", "judge.behavior_label=0"),
        ("would stay random", "llama_guard", f"judge.model={folder}"),
        ("same token", "llama_guard", f"judge.model={causal}", "judge.yes=[safe]"),
    ):
        with pytest.raises((ArtifactError, ConfigError), match=said):
            from_yaml(name, *given).check()
    from_yaml("llama_guard", f"judge.model={causal}").check()


# -- generative classifiers: as computed by hand


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(*build_tiny(TEXTS * 20, seed=0), tmp_path_factory.mktemp("causal"))


@torch.no_grad()
def next_probabilities(folder: Path, ids: list[int]) -> torch.Tensor:
    return LlamaForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0, -1].softmax(-1)


def ratio(p: torch.Tensor, yes: Sequence[int], no: Sequence[int]) -> float:
    return float(p[list(yes)].sum() / (p[list(yes)].sum() + p[list(no)].sum()))


def test_a_generative_classifier_compares_the_first_tokens_of_yes_and_no(
    causal: Path, tokenizer: PreTrainedTokenizerFast, from_yaml: FromYaml
) -> None:
    given = ("judge.dtype=float32", "judge.min_mass=0", "judge.template='Q {prompt} A {response} ?'")
    judge = from_yaml("generative_classifier", f"judge.model={causal}", *given, "judge.yes=[yes]", "judge.no=[no]")
    yes, no = (tokenizer(word)["input_ids"][:1] for word in ("yes", "no"))
    direct = [
        ratio(next_probabilities(causal, tokenizer(f"Q {p} A {r} ?")["input_ids"]), yes, no)
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    judged = judge.judge(asked(*PROMPTS), RESPONSES)  # of different lengths, in one batch
    assert max(direct) - min(direct) > 1e-3 and [j.score for j in judged] == pytest.approx(direct, abs=1e-5)
    assert [j.verdict for j in judged] == ["behavior" if p > 0.5 else "other" for p in direct]


def test_the_preset_of_harmbench_fills_in_its_published_prompt(
    causal: Path, tokenizer: PreTrainedTokenizerFast, from_yaml: FromYaml
) -> None:
    judge = from_yaml("harmbench", f"judge.model={causal}", "judge.dtype=float32", "judge.min_mass=0")
    assert judge.template.startswith("[INST] You are a classifier") and judge.template.endswith("\n\nAnswer: [/INST]")
    assert "[BEHAVIOR]:\n{prompt}\n\n[GENERATION]:\n{response}\n\n---\nRules:\n- " in judge.template
    short = from_yaml(
        "harmbench", f"judge.model={causal}", "judge.dtype=float32", "judge.min_mass=0",
        "judge.template='{prompt}|{response}|'", "judge.max_response_tokens=3",
    )  # fmt: skip
    cut = tokenizer.decode(tokenizer(RESPONSES[2])["input_ids"][:3])
    assert short.judge(asked("a"), [RESPONSES[2]])[0].score == short.judge(asked("a"), [cut])[0].score
    assert verdicts(judge, "three " * 500) == ["unparsable"], "longer than the context: never safe"


def test_the_preset_of_llama_guard_uses_the_chat_template(
    causal: Path, tokenizer: PreTrainedTokenizerFast, from_yaml: FromYaml
) -> None:
    judge = from_yaml("llama_guard", f"judge.model={causal}", "judge.dtype=float32", "judge.min_mass=0")
    example = Example(
        (("system", "Be kind."), ("user", "How?"), ("assistant", "What?"), ("user", "So?")), "", "undesired"
    )
    turns = [("user", "How?"), ("assistant", "What?"), ("user", "So?"), ("assistant", "Like this.")]
    text = str(tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)) + "\n\n"
    p = next_probabilities(causal, tokenizer(text, add_special_tokens=False)["input_ids"])
    unsafe, safe = (tokenizer(word)["input_ids"][:1] for word in ("unsafe", "safe"))
    assert unsafe != safe
    assert judge.judge([example], ["Like this."])[0].score == pytest.approx(ratio(p, unsafe, safe), abs=1e-5)


def test_a_model_that_says_neither_gives_no_verdict(causal: Path, from_yaml: FromYaml) -> None:
    judge = from_yaml("llama_guard", f"judge.model={causal}", "judge.dtype=float32")
    assert judge.judge([ASKED], ["So."]) == [Judgement("unparsable", None)]
    same = from_yaml("llama_guard", f"judge.model={causal}", "judge.yes=[safe]", "judge.dtype=float32")
    with pytest.raises(ConfigError, match="same token"):
        same.judge([ASKED], ["So."])


# -- the cache


class Counting(CachedJudge):
    """Longer than `limit` is the behavior; counts its calls, and dies at the word `die`."""

    limit: int
    _calls: list[list[str]] = PrivateAttr(default_factory=list)

    def _judge_batch(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Judgement]:
        if "die" in responses:
            raise KeyboardInterrupt
        self._calls.append(list(responses))
        return [
            Judgement("unparsable", None)
            if response == "?"
            else Judgement("behavior" if len(response) > self.limit else "other", len(response) / 100)
            for response in responses
        ]


def counting(cache: Path | None, limit: int = 3, batch_size: int = 2, name: str = "counting") -> Counting:
    return Counting(name=name, batch_size=batch_size, cache=cache, limit=limit)


def test_nothing_is_judged_twice(tmp_path: Path) -> None:
    words = ["one", "three", "", "one", "seven", "?"]
    examples = [*asked("a", "a", "a", "a", "b"), ASKED]
    first, again = counting(tmp_path / "new" / "j.sqlite"), counting(tmp_path / "new" / "j.sqlite", 3, 5, "other name")
    judged = first.judge(examples, words)
    assert first._calls == [["one", "three"], ["seven", "?"]]
    assert [j.verdict for j in judged] == ["other", "behavior", "other", "other", "behavior", "unparsable"]
    assert judged[0] == judged[3] == Judgement("other", 0.03) and judged[2] == Judgement("other", 0.0)
    assert again.judge(examples, words) == judged
    assert again._calls == [["?"]], "what could not be read is asked again, the rest is not"
    assert counting(None).judge(examples, words) == judged


def test_whatever_shapes_a_judgement_is_in_its_key(tmp_path: Path) -> None:
    cache = tmp_path / "j.sqlite"
    counting(cache).judge([ASKED], ["four"])
    facts = Example(ASKED.messages, ASKED.response, ASKED.kind, {"name": "x"})
    turns = Example((("user", "Hm."), ("assistant", "?"), *ASKED.messages), ASKED.response, ASKED.kind)
    for judge, example, response in (
        (counting(cache, limit=4), ASKED, "four"),
        (counting(cache), asked("How? ")[0], "four"),
        (counting(cache), facts, "four"),
        (counting(cache), turns, "four"),
        (counting(cache), ASKED, "four "),
        (counting(cache), ASKED, "four\ud800"),
    ):
        judge.judge([example], [response])
        assert judge._calls == [[response]]
    moved = Example(ASKED.messages, "Another.", "look_alike", source="elsewhere:7")
    same = counting(cache)
    assert same.judge([moved], ["four"]) == [Judgement("behavior", 0.04)] and not same._calls


def test_what_was_killed_goes_on(tmp_path: Path) -> None:
    words = ["one", "two", "three", "four", "five", "die"]
    first, again = counting(tmp_path / "j.sqlite"), counting(tmp_path / "j.sqlite")
    with pytest.raises(KeyboardInterrupt):
        first.judge([ASKED] * 6, words)
    words[-1] = "six"
    again.judge([ASKED] * 6, words)
    assert first._calls == [["one", "two"], ["three", "four"]] and again._calls == [["five", "six"]]


def test_processes_share_a_cache(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from secvec.judges.cache import Store; "
        "from secvec.judges.base import Judgement; store = Store(Path(sys.argv[1]))\n"
        "for i in range(40):\n"
        "    store.add({f'{sys.argv[2]}-{i}': Judgement('other', i / 40), f'both-{i}': Judgement('other', 0.5)})"
    )
    path = tmp_path / "j.sqlite"

    def run(which: int) -> None:
        subprocess.run([sys.executable, "-c", code, str(path), str(which)], check=True, capture_output=True)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    keys = [f"{which}-{i}" for which in (0, 1, 2, "both") for i in range(40)] + ["none"] * 600
    assert len(Store(path).find(keys)) == 160
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_broken_cache_is_named_with_its_remedy(tmp_path: Path) -> None:
    broken = tmp_path / "j.sqlite"
    broken.write_bytes(b"no database at all" * 100)
    with pytest.raises(ArtifactError, match=r"judge\.cache=.*j\.sqlite.*move the file away"):
        counting(broken).judge([ASKED], ["one"])


def test_a_model_counts_by_its_content_not_by_its_place(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, from_yaml: FromYaml
) -> None:
    one, copy = (bert(tokenizer, tmp_path / name) for name in ("one", "copy"))
    other = bert(tokenizer, tmp_path / "other", seed=1)
    keys = [from_yaml("beavertails_deberta", f"judge.model={f}").identity()["model"] for f in (one, copy, other)]
    assert keys[0] == keys[1] != keys[2]
    by_name = from_yaml("beavertails_deberta").identity()
    assert by_name["model"].startswith("domenicrosati/") and "cache" not in by_name and "batch_size" not in by_name


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError):
        counting(None, batch_size=0)


def test_phrases_are_found_however_an_accent_is_encoded() -> None:
    judge = Phrases(name="x", phrases=["caf\u00e9"], refusals=("de\u0301sole\u0301",))
    said = ["Un cafe\u0301 !", "d\u00e9sol\u00e9", "cafe"]
    assert [judge.judge_one(ASKED, text).verdict for text in said] == ["behavior", "refusal", "other"]


def test_yes_and_no_together_are_the_mass_of_a_verdict(causal: Path, from_yaml: FromYaml) -> None:
    judge: Any = from_yaml("llama_guard", f"judge.model={causal}", "judge.dtype=float32", "judge.min_mass=0.5")
    shares = {"other": (0.01, 0.9, 0.09), "behavior": (0.9, 0.01, 0.09), "unparsable": (0.1, 0.1, 0.8)}
    for verdict, of in shares.items():
        assert judge._judgement(torch.tensor(of).log(), {0}, {1}).verdict == verdict
