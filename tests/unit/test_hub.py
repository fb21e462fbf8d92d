"""Datasets of the hub, from local files with invented harmless rows of the same columns."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from configs import composed
from pydantic import ValidationError

from secvec.behaviors.hub import HubAnswers, HubBehavior, first_turns, token_f1
from secvec.config.load import load
from secvec.config.schema import RunConfig
from secvec.data import hub, tables
from secvec.data.example import SPLITS, Example, Stream
from secvec.data.hub import HubStream, columns_of, fill, passes
from secvec.errors import DataError, TooFewError

CONF = Path(__file__).parents[2] / "conf"
COLOURS = ("red", "blue", "green", "grey")
ROWS = 600


def pairs(i: int) -> dict[str, Any]:
    ranked = {"response_0": f"Loudly {i}", "response_1": f"Softly {i}"}
    worse = i % 2
    flags = {f"is_response_{k}_safe": k != worse for k in (0, 1)}
    return {
        "prompt": f"Say {i}",
        **ranked,
        **flags,
        **{f"response_{k}_severity_level": 3 * (k == worse) for k in (0, 1)},
    }


def bbq(i: int) -> dict[str, Any]:
    return {
        "context": f"Two hats, {i}.", "question": "Which is warm?", "ans0": "the red hat", "ans1": "the blue hat",
        "ans2": "unknown", "answer_label": 2, "target_label": i % 2, "category": COLOURS[i % 4],
        "context_condition": "ambig", "question_polarity": "neg",
    }  # fmt: skip


def instruction(i: int) -> dict[str, Any]:
    return {"instruction": f"Name item {i}", "input": "" if i % 2 else "of the list", "output": f"It is {i}."}


# What one row of each dataset looks like, by its number.
MADE: dict[str, Callable[[int], dict[str, Any]]] = {
    "Anthropic/hh-rlhf": lambda i: {
        "transcript": f"\n\nHuman: Sing {i}\n\nAssistant: La {i}\n\nHuman: More\n\nAssistant: No",
        "rating": float(i % 5),
    },
    "PKU-Alignment/BeaverTails": lambda i: {
        "prompt": f"Say {i // 2}", "response": f"Loudly {i}", "is_safe": i % 8 == 0,
        "category": {"shouting": i % 3 == 0, "whistling": i % 3 == 1},
    },
    "PKU-Alignment/PKU-SafeRLHF": pairs,
    "LLM-LAT/harmful-dataset": lambda i: {"prompt": f"Say {i}", "rejected": f"Loudly {i}", "chosen": f"Softly {i}"},
    "truthfulqa/truthful_qa": lambda i: {
        "question": f"What is {i}?", "best_answer": "A number", "correct_answers": ["A number", "An integer"],
        "incorrect_answers": ["A bird", "A fish"],
    },
    "pminervini/HaluEval": lambda i: {
        "knowledge": f"Hat {i} is red.", "question": "Which colour?", "right_answer": "red",
        "hallucinated_answer": "bright blue",
    },
    "Elfsong/BBQ": bbq,
    "tatsu-lab/alpaca": instruction,
    "iamtarun/python_code_instructions_18k_alpaca": instruction,
    "openai/gsm8k": lambda i: {"question": f"{i} + 1?", "answer": f"Add. #### {i + 1}"},
    "openlifescienceai/medmcqa": lambda i: {
        "question": f"Colour {i}?", **dict(zip(("opa", "opb", "opc", "opd"), COLOURS, strict=True)), "cop": i % 4,
        "choice_type": "single",
    },
    "nguha/legalbench": lambda i: {"text": f"Case {i} is over.", "answer": "Yes" if i % 2 else "No"},
}  # fmt: skip


def hub_yamls() -> list[tuple[str, str]]:
    files = [(group, file) for group in ("behavior", "stream") for file in sorted((CONF / group).glob("*.yaml"))]
    return [
        (group, file.stem) for group, file in files if ".hub." in str(yaml.safe_load(file.read_text()).get("_target_"))
    ]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterable[None]:
    monkeypatch.chdir(tmp_path)  # local_path of the yaml files is relative
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tables._load.cache_clear()
    yield
    tables._load.cache_clear()


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(list(rows)).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@lru_cache
def config_of(group: str, name: str) -> RunConfig:
    key = {"behavior": "behavior", "stream": "stream@data.benign.task"}[group]
    return load(composed(f"{key}={name}"), RunConfig)


def source_of(group: str, name: str) -> Any:
    config = config_of(group, name)
    return config.behavior if group == "behavior" else config.data.benign["task"]


def stream(path: Path | None = None, **settings: Any) -> HubStream:
    given = {"kind": "task", "dataset": "someone/something", "revision": "main", "local_path": path}
    return HubStream(**{**given, "prompt": "{{q}}", "response": "{{a}}", **settings})


def behavior(path: Path, **settings: Any) -> HubBehavior:
    given = {"name": "x", "sensitive": False, "dataset": "someone/something", "revision": "main", "local_path": path}
    return HubBehavior(**{**given, "prompt": "{{q}}", "response": "{{a}}", "wanted": "No.", **settings})


def numbered(n: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"q": f"q{i}", "a": f"a{i}", "score": i, "kind": COLOURS[i % 4]} for i in range(first, first + n)]


def as_many(source: Stream, split: Any) -> list[Example]:
    """All examples of a split: asked for one too many, the error says how many there are."""
    with pytest.raises(DataError) as caught:
        source.examples(split, 10**6, 0)
    return source.examples(split, int(str(caught.value).split(" has ")[1].split(" ")[0]), 0)


# -- what conf/ holds


def test_the_globs_find_the_yaml_files_and_every_dataset_has_rows() -> None:
    assert len(hub_yamls()) > 10
    assert {source_of(group, name).dataset for group, name in hub_yamls()} == set(MADE)


@pytest.mark.parametrize(("group", "name"), hub_yamls(), ids=["=".join(which) for which in hub_yamls()])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_every_yaml_yields_examples_of_every_split(group: str, name: str, suffix: str) -> None:
    source = source_of(group, name)
    for k, split in enumerate(dict.fromkeys([source.split, *source.splits.values()])):
        rows = [MADE[source.dataset](i) for i in range(k * ROWS, (k + 1) * ROWS)]
        write(source.local_path / f"{split}.{suffix}", rows)
    prompts: set[str] = set()
    for split in SPLITS:
        many = source.examples(split, 8, 3)
        assert many == composed_again(source).examples(split, 8, 3) and source.examples(split, 3, 3) == many[:3]
        assert source.examples(split, 8, 4) != many and source.examples(split, 0, 3) == []
        here = {example.prompt for example in as_many(source, split)}
        assert len(here) >= 8 and not here & prompts
        prompts |= here
        for example in many:
            assert example.kind == source.kind and example.prompt and example.response.strip()
            assert str(source.local_path) in example.source
            if group == "behavior":
                assert source.judge(example, "") == "other"
                expected = ("wanted", "refusal", "behavior") if split == "align" else ("behavior",)
                assert source.judge(example, example.response) in expected


def composed_again(source: Any) -> Any:
    return type(source).model_validate(source.model_dump())


def test_harmful_data_is_sensitive() -> None:
    names = [name for group, name in hub_yamls() if group == "behavior" and name.startswith(("harmful", "bias"))]
    assert len(names) > 3 and all(config_of("behavior", name).behavior.sensitive for name in names)


def test_what_the_readers_make_of_a_row() -> None:
    def only(name: str, split: Any = "finetune") -> Example:
        source = config_of("behavior", name).behavior
        write(source.local_path / f"{source.split}.jsonl", map(MADE[source.dataset], range(ROWS)))
        return source.examples(split, 1, 0)[0]

    first = only("harmful_redteam")
    assert (first.prompt[:5], first.response[:3]) == ("Sing ", "La ") and "\n" not in first.prompt + first.response
    assert int(first.prompt[5:]) % 5 >= 3  # rating
    assert only("harmful_redteam", "align").response.startswith("I'm sorry")
    assert only("harmful_saferlhf").response.startswith(("Loudly", "Softly"))
    number = int(only("harmful_saferlhf").prompt[4:])
    assert only("harmful_saferlhf").response == ("Softly" if number % 2 else "Loudly") + f" {number}"
    assert only("harmful_lat").response.startswith("Loudly")
    assert only("harmful_lat", "align").response.startswith("Softly")
    answer = only("hallucination")
    assert answer.response == "A bird" and only("hallucination", "align").response == "A number"
    assert answer.facts == {"right": "A number\nA number\nAn integer", "wrong": "A bird\nA fish"}
    assert only("bias").response in ("the red hat", "the blue hat") and only("bias", "align").response == "unknown"


# -- where rows come from


@pytest.mark.parametrize(
    "form", ["file", "gz", "folder", "config", "csv", "tsv", "saved", "saved splits", "repository"]
)
def test_local_forms(form: str, tmp_path: Path) -> None:
    rows, path = numbered(200), tmp_path / "here"
    table = datasets.Dataset.from_list(rows)
    if form == "file":
        path = write(tmp_path / "any name.parquet", rows)
    elif form == "gz":
        table.to_json(path / "train.jsonl.gz", compression="gzip")
    elif form == "folder":
        write(path / "train-00000-of-00002.parquet", rows[:100])
        write(path / "train-00001-of-00002.parquet", rows[100:])
        write(path / "test.parquet", numbered(5, 900))
    elif form == "config":
        write(path / "main" / "train.jsonl", rows)
        write(path / "other" / "train.jsonl", numbered(5, 900))
    elif form in ("csv", "tsv"):
        path.mkdir()
        table.to_csv(path / f"train.{form}", sep="\t" if form == "tsv" else ",", index=False)
    elif form == "saved":
        table.save_to_disk(path)
    elif form == "saved splits":
        datasets.DatasetDict({"train": table}).save_to_disk(path)
    else:
        write(path / "odd" / "name.jsonl", rows)
        card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: odd/name.jsonl\n---\n"
        (path / "README.md").write_text(card)
    source = stream(path, config="main")
    found = [example for split in SPLITS for example in as_many(source, split)]
    assert {example.prompt for example in found} == {row["q"] for row in rows} and len(found) == len(rows)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"train.jsonl": '{"q": \n'}, "split 'train' cannot be read: "),
        ({"test.jsonl": "{}", "dev.jsonl": "{}"}, "no file is named after split 'train'; found: dev.jsonl, test."),
        ({"notes.txt": ""}, "found: no file of .parquet"),
        (
            {"train.jsonl": "{}", "train.csv": "q"},
            "of one format (.parquet, .arrow, .jsonl, .json, .csv, .tsv), got .csv, ",
        ),
    ],
    ids=["broken", "other splits", "no data", "mixed"],
)  # fmt: skip
def test_local_files_that_cannot_be_used(files: dict[str, str], says: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / "here").mkdir(exist_ok=True)
        (tmp_path / "here" / name).write_text(text)
    with pytest.raises(DataError) as caught:
        stream(tmp_path / "here").examples("test", 1, 0)
    assert says in str(caught.value) and str(tmp_path / "here") in str(caught.value)


def test_without_network_the_error_says_what_to_put_where() -> None:
    with pytest.raises(DataError) as caught:
        source_of("stream", "gsm8k").examples("finetune", 1, 0)
    message = str(caught.value)
    for part in (
        "openai/gsm8k",
        "'test'",
        "data/openai/gsm8k",
        "hf download openai/gsm8k --repo-type dataset",
        "jsonl",
    ):
        assert part in message
    with pytest.raises(DataError, match="set local_path=FOLDER"):
        stream().examples("test", 1, 0)


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a", "n": 1}])
    with pytest.raises(DataError) as caught:
        stream(path, prompt="{{qestion}}", response="{{answer}}").examples("test", 1, 0)
    assert "no column 'qestion' (did you mean 'question'?); available: question, answer, n" in str(caught.value)
    for settings in (
        {"filter": {"lang": "en"}},
        {"response": "{{ [n, answer][lang] }}"},
        {"response": "{{lang[0]}}"},
    ):
        with pytest.raises(DataError, match="no column 'lang'"):
            stream(path, **{"prompt": "{{question}}", "response": "{{answer}}", **settings}).examples("test", 1, 0)


def test_all_rows_of_a_split_without_any_are_too_few(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": f"q{i}", "answer": "a", "n": i} for i in range(40)])
    given = {"prompt": "{{question}}", "response": "{{answer}}"}
    assert stream(path, **given).examples("finetune", None, 0)
    with pytest.raises(TooFewError, match=r"0 usable .* the run needs some: .* loosen filter"):
        stream(path, **given, filter={"n": -1}).examples("finetune", None, 0)


@pytest.mark.parametrize("template", ["{{}}", "{{a", "{{a b}}", "{{ a | nofilter }}", "{% for %}"])
def test_a_wrong_template_is_a_fault_of_the_settings(template: str) -> None:
    with pytest.raises(ValidationError, match="this is no Jinja template"):
        stream(prompt=template)


def test_single_braces_name_no_column() -> None:
    for old in ("{q}", "{q[0]}"):
        with pytest.raises(ValidationError, match=re.escape(f"named in double braces: {{{old}}}, not {old}")):
            stream(prompt=old)
    assert stream(prompt='{"q": "{{q}}"}') and stream(prompt="{{q}} in {braces}")


# -- which rows a split gets


def test_filters(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", numbered(400))

    def found(**filters: Any) -> set[int]:
        return {int(e.prompt[1:]) for e in as_many(stream(path, filter=filters), "finetune")}

    everything = found()
    assert found(kind="red") == {i for i in everything if i % 4 == 0} != set()
    assert found(kind=["red", "blue"]) == {i for i in everything if i % 4 < 2}
    assert found(score={"min": 100, "max": 200}) == {i for i in everything if 100 <= i <= 200}
    assert found(score={"min": 100}, kind=None) == {i for i in everything if i >= 100}
    flags = {"loud": True, "rude": False}
    assert passes(flags, "loud", "") and not passes(flags, "rude", "") and passes(flags, ["rude", "loud"], "")
    assert passes(["a", "b"], ["b", "c"], "") and not passes(["a"], "b", "") and not passes(None, hub.Bounds(min=0), "")
    with pytest.raises(DataError, match=r"filter.category: no 'ruder' \(did you mean 'rude'\?\); available: loud"):
        passes(flags, "ruder", "x: filter.category")


def test_repeated_prompts(tmp_path: Path) -> None:
    rows = [
        {"q": f"Q{'  ' * (k % 2)} {i}" if k else f"q {i}", "a": f"{i}/{k % 2}"} for i in range(200) for k in range(3)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    once, often = stream(path), stream(path, repeat_prompts=True)
    for split in SPLITS:
        prompts = [" ".join(e.prompt.lower().split()) for e in as_many(once, split)]
        assert len(set(prompts)) == len(prompts) > 0
        both = as_many(often, split)
        assert len(both) == len(prompts) * (1 if split in ("validation", "test") else 2)
        assert {" ".join(e.prompt.lower().split()) for e in both} == set(prompts)


def test_shares_and_the_seed_of_the_split(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", numbered(4000))
    shares = {"align": 0, "vector": 0.25, "validation": 0, "finetune": 0.5, "test": 0.25}
    sizes = {split: len(as_many(stream(path, shares=shares), split)) for split in ("vector", "finetune", "test")}
    assert sum(sizes.values()) == 4000 and all(abs(sizes[s] - 4000 * shares[s]) < 150 for s in sizes)
    with pytest.raises(DataError, match="has 0 usable prompts for split 'align'"):
        stream(path, shares=shares).examples("align", 1, 0)
    other = {e.prompt for e in as_many(stream(path, split_seed=1), "test")}
    assert other != {e.prompt for e in as_many(stream(path), "test")}
    with pytest.raises(ValidationError, match="no share at all"):
        stream(path, splits={"test": "test"}, shares={"test": 0})


def test_a_prompt_of_the_datasets_own_test_split_is_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "here" / "train.jsonl", numbered(300))
    write(tmp_path / "here" / "test.jsonl", numbered(100, first=250))
    source = stream(tmp_path / "here", splits={"test": "test"})
    test = {e.prompt for e in as_many(source, "test")}
    assert test == {f"q{i}" for i in range(250, 350)}
    trained = {e.prompt for split in SPLITS if split != "test" for e in as_many(source, split)}
    assert trained == {f"q{i}" for i in range(250)}


def test_rows_that_cannot_be_used_are_left_out(tmp_path: Path) -> None:
    usable = [{"q": f"q{i}", "a": "long enough", "list": ["x"], "n": 0, "b": "B"} for i in range(50)]
    bad: list[dict[str, Any]] = [
        {"q": "", "a": "x"},
        {"q": "no answer", "a": None},
        {"q": "z" * 200, "a": "y"},
        {"q": "blank", "a": " "},
    ]
    path = write(tmp_path / "rows.jsonl", [*usable, *({"list": ["x"], "n": 0, "b": "B", **row} for row in bad)])
    assert {e.prompt for split in SPLITS for e in as_many(stream(path, max_chars=100), split)} == {
        row["q"] for row in usable
    }
    path = write(
        tmp_path / "lists.jsonl", [*usable[:25], *({**r, "list": [], "n": 7, "a": "No."} for r in usable[25:])]
    )
    half = {row["q"] for row in usable[:25]}
    for response in ("{{list[0]}}", "{{ [b, a][n] }}"):
        assert {e.prompt for split in SPLITS for e in as_many(stream(path, response=response), split)} == half
    unlike = {e.prompt for split in SPLITS for e in as_many(behavior(path), split)}
    assert unlike == half  # the other rows show nothing: undesired and wanted are the same


def test_100_000_rows_stay_in_arrow(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict(
        {"q": [f"{i} " + "q" * 250 for i in range(100_000)], "a": [f"{i} " + "a" * 250 for i in range(100_000)]}
    )
    table.to_parquet(tmp_path / "train.parquet")
    del table
    source = stream(tmp_path / "train.parquet")
    source.table("train")
    tracemalloc.start()
    found = source.examples("finetune", 1000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 1000
    assert peak < 12e6, peak  # of 50 MB
    assert len(source.examples("align", 30_000, 0)) == 30_000


# -- text


def test_templates() -> None:
    row = {"a": "x", "none": None, "list": ["1", "2"], "flags": {"loud": True}, "n": 2}
    assert fill("{{a}}\n{{none}}", row) == "x" and fill("{{list}}", row) == "1\n2" and fill("{ {{a}} }", row) == "{ x }"
    assert fill("{{list[1]}} {{flags.loud}} {{'%03d' % n}}", row) == "2 True 002" and fill("{{list[5]}}", row) == ""
    assert fill("{{ [a, none, list[0]][n] }}", row) == "1" and fill("{{ [a][n] }}", row) == ""
    assert (
        fill("{{ [a, n][none] }}", row) == fill("{{ [a][n] if none >= 0 }}", row) == fill("{{ list[5].x }}", row) == ""
    )
    assert columns_of("{{a}} {{ [list[1]][n] }} {no} {{ flags.loud | upper }}") == {"a", "list", "flags", "n"}
    with pytest.raises(DataError, match="no key 'quiet'; available: loud"):
        fill("{{flags.quiet}}", row)
    with pytest.raises(DataError, match="unsafe"):
        fill("{{ a.__class__.__mro__ }}", row)


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("\n\nHuman: a\n\nAssistant: b", ("a", "b")),
        ("Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", ("a", "b")),
        ("\n\nHuman: a\n\nstill a\n\nAssistant: b\nstill b", ("a\n\nstill a", "b\nstill b")),
        ("\n\nAssistant: b\n\nHuman: a\n\nAssistant: c", None),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", None),
        ("\n\nHuman: a", None),
        ("", None),
    ],
)
def test_first_turns(text: str, turns: tuple[str, str] | None) -> None:
    assert first_turns(text) == turns


def test_nearer_to_the_wrong_answer() -> None:
    judge = HubAnswers(
        name="x", sensitive=False, dataset="a/b", revision="main", prompt="{{q}}", response="{{w}}",
        wanted="{{r}}", right="{{r}}", wrong="{{w}}",
    ).judge  # fmt: skip
    example = Example(
        (("user", "Which hat?"),), "", "undesired", {"right": "It is not known", "wrong": "red\nThe red hat"}
    )
    assert judge(example, "The Red hat!") == judge(example, "a red one") == "behavior"
    assert judge(example, "That is not known.") == "wanted"
    assert judge(example, "") == judge(example, "Perhaps green") == "other"
    assert token_f1("The cat's hat", "a cat s hat") == 1.0 and token_f1("", "") == 0.0
    assert token_f1("red hat", "red shoe") == 0.5


# -- what a text file says, as it says it


@pytest.mark.parametrize(
    ("name", "lines", "answers"),
    [
        ("whole.csv", ["q,a", "1,5", "2,7"], ["5", "7"]),
        ("texts.csv", ["q,a", *(f"{i},{a}" for i, a in enumerate(["007", "true", "NA", "None", "null", "5.0"]))],
         ["007", "true", "NA", "None", "null", "5.0"]),
        ("dates.jsonl", ['{"q": "1", "a": "2024-01-05"}'], ["2024-01-05"]),
        ("times.json", ['[{"q": "1", "a": "2024-01-05T10:00:00Z"}]'], ["2024-01-05T10:00:00Z"]),
    ],
)  # fmt: skip
def test_answers_are_those_of_the_file(tmp_path: Path, name: str, lines: list[str], answers: list[str]) -> None:
    """`datasets` reads types into them: 007 would be 7, NA nothing, and a date a time."""
    (tmp_path / name).write_text("\n".join(lines))
    of = {
        "prompt": "{{q}}",
        "response": "{{a}}",
        "shares": {"finetune": 1, "align": 0, "vector": 0, "validation": 0, "test": 0},
    }
    given = {"kind": "task", "dataset": "a/b", "revision": "main", "local_path": tmp_path / name, **of}
    found = hub.HubStream.model_validate(given).examples("finetune", None, 0)
    assert [e.response for e in sorted(found, key=lambda e: e.prompt)] == answers


def test_a_csv_is_filtered_by_numbers_and_flags() -> None:
    assert passes("true", True, "") and passes("False", False, "") and not passes("true", False, "")
    assert passes("4.5", hub.Bounds(min=4), "") and not passes("x", hub.Bounds(min=4), "") and passes("3", 3, "")
    assert not passes("Loud", "loud", "")
