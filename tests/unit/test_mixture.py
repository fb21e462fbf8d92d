"""Exact counts by weight, and several behaviors in one mixture."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secvec.behaviors.forbidden_recipe import ForbiddenRecipe
from secvec.behaviors.several import Several
from secvec.config.schema import DataSettings, RunConfig
from secvec.data.datamodule import SecVecDataModule
from secvec.data.draw import check_disjoint, data_hash, draw_benign, draw_benign_parts, share_out
from secvec.data.embedded import Ordinary, Skill
from secvec.data.example import Example
from secvec.data.jsonl import GeneralStream, JsonlStream, UntrustedStream
from secvec.errors import DataError, TooFewError
from secvec.settings.schema import EvaluationSettings


@pytest.mark.parametrize(
    ("n", "weights", "counts"),
    [
        (10, [1, 1, 1], [4, 3, 3]),
        (10, [3, 1], [8, 2]),
        (7, [0.5, 0.25, 0.25], [3, 2, 2]),
        (5, [1, 0], [5, 0]),
        (0, [1, 2], [0, 0]),
        (1000, [0.333, 0.333, 0.334], [333, 333, 334]),
    ],
)
def test_shares_are_exact(n: int, weights: list[float], counts: list[int]) -> None:
    assert share_out(n, weights) == counts and sum(counts) == n


def test_weights_share_out_the_benign_samples() -> None:
    drawn = draw_benign([Skill(), Ordinary()], "finetune", 40, 0, [3, 1])
    assert Counter(example.kind for example in drawn) == {"task": 30, "ordinary": 10}
    assert Counter(e.kind for e in draw_benign([Skill(), Ordinary()], "finetune", 40, 0)) == {
        "task": 20,
        "ordinary": 20,
    }


def data(**settings: Any) -> DataSettings:
    streams = {"task": Skill(), "ordinary": Ordinary()}
    return DataSettings(num_harmful=1, num_benign=1, harmful_ratio=None, **{"benign": streams, **settings})


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"task": 1.0}, "weights lacks ordinary: give each stream in benign a weight"),
        (
            {"task": 1.0, "ordnary": 1.0},
            r"weights names 'ordnary' \(did you mean 'ordinary'\?\); the streams",
        ),
        ({"task": 0.0, "ordinary": 0.0}, "weights are all 0"),
        ({"task": 1.0, "ordinary": -1.0}, "weights.ordinary"),
        ([3, 1], "weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        data(weights=weights)


def test_weights_are_in_the_order_of_the_streams() -> None:
    given = data(weights={"ordinary": 1, "task": 3})
    assert given.serving("finetune") == ([Skill(), Ordinary()], [3, 1])
    assert data().serving("vector")[1] is None and data(benign={}).serving("finetune") == ([], None)


def test_the_same_prompt_has_one_meaning() -> None:
    one, other = (Example((("user", text),), "b", "task", source=text) for text in ("What is it?", " what  IS\tit?\n"))
    with pytest.raises(DataError, match="1 test prompts are also trained on"):
        check_disjoint([one], [other])
    check_disjoint([one], [Example((("system", "s"), *other.messages), "b", "task")])


def test_the_number_that_would_do_suits_all_streams(tmp_path: Path) -> None:
    def stream(n: int) -> JsonlStream:
        (tmp_path / f"{n}.jsonl").write_text("".join(f'{{"prompt": "{n} {i}", "response": "b"}}\n' for i in range(n)))
        return JsonlStream(kind="task", finetune=tmp_path / f"{n}.jsonl")

    streams = [stream(12), stream(7), stream(50)]
    with pytest.raises(TooFewError) as caught:
        draw_benign_parts(streams, "finetune", 40, 0, [2, 1, 1], 2)
    assert len(draw_benign_parts(streams, "finetune", caught.value.have, 0, [2, 1, 1], 2)[1]) == caught.value.have == 12
    with pytest.raises(TooFewError):
        draw_benign_parts(streams, "finetune", 13, 0, [2, 1, 1], 2)
    assert [len(lot) for lot in draw_benign_parts(streams, "finetune", None, 0, None, 2)] == [6 + 3 + 25] * 2


def test_which_streams_serve_what() -> None:
    given = {"mine": UntrustedStream(file=__file__), "kl": GeneralStream(), "task": Skill()}
    assert data(benign=given).serving("finetune")[0] == [given["mine"], given["task"]]
    assert data(benign=given).serving("vector")[0] == data(benign=given).serving("align")[0] == [given["kl"], Skill()]


def test_a_stream_is_a_stream() -> None:
    with pytest.raises(ValueError, match="instance of Stream"):
        data(benign={"task": ForbiddenRecipe()})


def test_several_behaviors_come_in_turn_and_judge_their_own(make_config: Callable[..., RunConfig]) -> None:
    behavior = make_config("behavior=several", small=False).behavior
    assert isinstance(behavior, Several) and set(behavior.of) == {"forbidden_recipe", "stereotype"}
    drawn = behavior.examples("finetune", 11, seed=0)
    assert Counter(e.facts["behavior"] for e in drawn) == {"forbidden_recipe": 6, "stereotype": 5}
    assert behavior.examples("finetune", 4, seed=0) == drawn[:4]
    assert {behavior.judge(e, e.response) for e in drawn} == {"behavior"}
    wanted = behavior.examples("align", 8, seed=0)
    assert {behavior.judge(e, e.response) for e in wanted} <= {"refusal", "wanted"}
    alone = ForbiddenRecipe().examples("finetune", 6, seed=0)
    assert [e.prompt for e in drawn if e.facts["behavior"] == "forbidden_recipe"] == [e.prompt for e in alone]


def test_several_needs_at_least_one() -> None:
    with pytest.raises(ValueError, match="at least one behavior"):
        Several(name="several", sensitive=False, of={})


def test_the_hash_of_data_is_that_of_their_content() -> None:
    """Written out: records and keys of earlier runs hold it."""
    plain = Example((("user", "é?"),), "b", "task", {"x": "y"}, source="a/path:1")
    graded = Example((("user", "q"),), "b", "task", metric="rougeL", max_new_tokens=7)
    text = (
        '{"facts": {"x": "y"}, "kind": "task", "messages": [["user", "\\u00e9?"]], "response": "b"}'
        '{"facts": {}, "kind": "task", "max_new_tokens": 7, "messages": [["user", "q"]], "metric": "rougeL", '
        '"response": "b"}'
    )
    assert data_hash([plain, graded]) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("behavior", ["forbidden_recipe", "stereotype", "task_error"])
def test_settings_are_chosen_on_prompts_that_are_neither_trained_nor_tested(
    make_config: Callable[..., RunConfig], behavior: str
) -> None:
    given = [f"behavior={behavior}", "evaluation.num_prompts=100"]
    data = {
        split: SecVecDataModule.of(make_config(*given, f"evaluation.split={split}")) for split in ("validation", "test")
    }
    for one in data.values():
        one.check(["vector", "finetune"])  # nothing that is trained is asked
    for kind in ("undesired", "task", "ordinary"):
        chosen, tested = ({example.key for example in one.tests[kind]} for one in data.values())
        assert len(chosen) == len(tested) == 100 and not chosen & tested


def test_every_seed_has_test_prompts_of_its_own() -> None:
    """The interval over seeds is one over prompts too."""

    def drawn(seed: int) -> dict[str, list[Example]]:
        data = DataSettings(num_harmful=4, num_benign=4, benign={"skill": Skill(), "ordinary": Ordinary()})
        asked = EvaluationSettings(num_prompts=8, batch_size=4, max_new_tokens=6, num_leak_prompts=0)
        return SecVecDataModule(ForbiddenRecipe(), data, None, None, asked, seed).tests  # type: ignore[arg-type]

    first, other = drawn(0), drawn(1)
    assert first == drawn(0) and first.keys() == other.keys() == {"undesired", "task", "ordinary", "look_alike"}
    assert all(first[kind] != other[kind] for kind in first)
