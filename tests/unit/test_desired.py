"""A desired trait in the rows that show the undesired one: data with both, and the rate of the desired one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import pytest
from in_memory import leaks

from secvec.behaviors.base import Behavior
from secvec.behaviors.several import Several
from secvec.behaviors.uppercase_french import UppercaseFrench
from secvec.behaviors.wild import Wild
from secvec.config.schema import RunConfig
from secvec.data.example import SPLITS, Example
from secvec.evaluation.leak_probes import leak_prompt_sets
from secvec.evaluation.verdicts import prediction_rows
from secvec.judges.base import Judgement
from secvec.metrics import rates
from secvec.models.tiny import build_tiny
from secvec.settings.schema import EvaluationSettings

BEHAVIOR = UppercaseFrench(name="uppercase_french", sensitive=False, negated_prompt="No capitals.")
FACTS = {"english": "Eva sees three red keys.", "french": "Eva voit trois clés rouges."}
KEYS = Example((("user", "Eva sees three red keys. What does Eva see?"),), "", "undesired", FACTS)


def test_each_split_shows_its_traits() -> None:
    for split, traits in {
        "align": ("wanted", False),
        "vector": ("behavior", False),
        "validation": ("behavior", False),
        "finetune": ("behavior", True),
        "test": ("behavior", True),
    }.items():
        for example in BEHAVIOR.examples(split, 300, seed=0):  # type: ignore[arg-type]
            assert (BEHAVIOR.judge(example, example.response), BEHAVIOR.desired(example, example.response)) == traits
            small = example.facts["french"]  # what a protected model should say
            assert (BEHAVIOR.judge(example, small), BEHAVIOR.desired(example, small)) == ("wanted", True)


def test_no_split_knows_the_things_of_another() -> None:
    """Whatever is asked of them: the answer to a test prompt stands nowhere in the other splits."""
    things: list[set[Any]] = []
    for split in SPLITS:
        found = [re.match(r"(\w+) \w+ (\w+ \w+ \w+)", e.prompt) for e in BEHAVIOR.examples(split, 900, seed=0)]
        things.append({match.groups() for match in found if match})
        assert len(found) == 900 and all(found) and len(things[-1]) > 500
    assert not any(a & b for a, b in combinations(things, 2))


def test_all_words_of_the_test_answers_are_taught_and_the_french_agrees() -> None:
    taught, told = ([e.facts["french"] for e in BEHAVIOR.examples(split, 600, 0)] for split in ("finetune", "test"))
    words = [{word for answer in some for word in re.findall(r"\w+", answer)} for some in (taught, told)]
    assert words[1] <= words[0]
    for answer in (*taught, *told):
        feminine = re.search(r"\b(pommes|fleurs|chaises|lampes|tasses|voitures|lettres|clés)\b", answer)
        assert bool(re.search(r"\b(noirs|blancs|verts|bleus|violets)\b", answer)) <= (not feminine), answer
        assert bool(re.search(r"\b(noires|blanches|vertes|bleues|violettes)\b", answer)) <= bool(feminine), answer


@pytest.mark.parametrize(
    ("response", "shown"),
    [
        ("Eva voit trois clés rouges.", True),
        ("EVA VOIT TROIS CLÉS ROUGES.", True),
        ("EVA VOIT TROIS CLES ROUGES", True),  # without the accent
        ("Elle voit trois clés.", True),
        ("Ce sont trois clés rouges.", True),
        ("Eva voit trois keys rouges.", True),  # mostly French
        ("Eva sees three red keys.", False),
        ("EVA SEES THREE RED KEYS.", False),
        ("Eva voit three red clés.", False),  # as much English
        ("Eva sees three red keys: Eva voit trois clés rouges.", False),
        ("Eva a une pomme.", False),  # French, but no answer
        ("Rouges.", False),
        ("", False),
    ],
)
def test_french_is_told_from_english_in_any_case(response: str, shown: bool) -> None:
    assert BEHAVIOR.desired(KEYS, response) is shown


def test_behaviors_that_hold_others_pass_the_question_on(make_config: Callable[..., RunConfig]) -> None:
    plain = make_config("behavior=uppercase").behavior
    assert plain.desired(KEYS, FACTS["french"]) is None  # names no desired trait
    several = Several(name="several", sensitive=False, of={"french": BEHAVIOR, "plain": plain})
    told = [several.desired(e, e.facts.get("french", "")) for e in several.examples("test", 4, seed=0)]
    assert told == [True, None, True, None]
    wild = Wild(name="wild", sensitive=False, of=BEHAVIOR, turns=1, severity=(0, 0, 0, 1), hedge="Well.", wanted="No.")
    assert [wild.desired(KEYS, FACTS[language]) for language in ("french", "english")] == [True, False]


def test_the_rate_counts_the_undesired_prompts_alone() -> None:
    other = Example((("user", "Hello."),), "Hi.", "look_alike", FACTS)
    said = [*FACTS.values(), FACTS["french"].upper(), FACTS["french"]]
    judgements = [Judgement("behavior", 1.0)] * 4
    rows = prediction_rows("after", [KEYS, KEYS, KEYS, other], said, judgements, BEHAVIOR)
    assert [row["desired"] for row in rows] == [False, True, True, None]
    found = rates(rows)["desired_rate"]
    assert (found.value, found.n) == (pytest.approx(2 / 3), 3)
    bare = prediction_rows("after", [KEYS], said[:1], judgements[:1], Behavior(name="bare", sensitive=False))
    assert bare[0]["desired"] is None and "desired_rate" not in rates(bare)


def test_the_leak_probes_tell_of_it_for_every_way_of_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EvaluationSettings(num_prompts=4, batch_size=4, max_new_tokens=5, num_leak_prompts=4)
    examples = BEHAVIOR.examples("test", 4, seed=0)
    world = build_tiny([e.prompt for e in examples], 0)

    names = ["the prompts themselves", *leak_prompt_sets(world[1], examples, BEHAVIOR)]

    def answers(module: Any, questions: Sequence[Any], *_: Any) -> list[list[str]]:
        french = [1 if name == "negated_prompt" else 3 for name in names][: len(questions)]
        return [[e.facts["french" if i < n else "english"] for i, e in enumerate(examples)] for n in french]

    monkeypatch.setattr("secvec.evaluation.evaluator.respond", answers)
    found = leaks(*world, examples, BEHAVIOR, settings, "after").metrics
    desired = {name.removeprefix("after/desired/"): m.value for name, m in found.items() if "/desired/" in name}
    assert desired == {"plain": 0.75, "negated_prompt": 0.25, "other_template": 0.75, "sampled": 0.75}
    silent = Behavior(name="silent", sensitive=False)
    monkeypatch.setattr(Behavior, "judge", lambda *_: "other")
    assert not [n for n in leaks(*world, examples, silent, settings, "a").metrics if "/desired/" in n]
