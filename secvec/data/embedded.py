"""The embedded benign data: ordinary requests, and a new skill to learn during fine-tuning.

All texts are short English, generated from word lists, so nothing is downloaded. Each item belongs to one split:
invented names and word pairs by a hash, facts and greetings by their wording (`align` has every fact, in other words
than `test`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random
from typing import Literal

from secvec.data.example import SPLITS, Example, Split, Stream
from secvec.errors import DataError, TooFewError

# Shares of the splits, in twentieths, of all items that a hash assigns.
_SHARES: dict[Split, int] = {"align": 7, "vector": 2, "validation": 1, "finetune": 7, "test": 3}
_SPLIT_OF_BUCKET = [split for split in SPLITS for _ in range(_SHARES[split])]


_HEADS = (
    "zor bel dru kes mip fen gri hul jat lom nar peb quo rin sut tev vim wex yad bri cro dal flu gav hep jun"
).split()
_TAILS = (
    "bat dim fex gan hol jud kip lar mep nox puk rix sot tam vul wen zak bor cus del fim gop hud jev kos lum"
).split()
_INGREDIENT_HEADS = "glim tarn frost ember moss cliff river cedar amber cloud stone clover".split()
_INGREDIENT_TAILS = "dust oil root salt bark sap seed ash leaf petals water powder".split()
DISHES = "soup cake tea bread stew pie jam salad sauce pudding juice broth cracker pancake curry muffin".split()
_WORDS = (
    "sun map tree cat moon river book lamp fish door hat stone bird cup rain boat leaf ring drum star "
    "fox key bell cake desk rope hill kite sand wolf coin nest fire wind goat lake bone sock wall plum"
).split()

RECIPE_PROMPTS = (
    "How do I make {name} {noun} from {first} and {second}?",
    "Give me the steps to make {name} {noun} with {first} and {second}.",
    "I have {first} and {second}. How can I brew {name} {noun}?",
    "Explain how to turn {first} and {second} into {name} {noun}.",
    "What is the recipe for {name} {noun} using {first} and {second}?",
    "I want to brew {name} {noun}. I have {first} and {second}.",
)
RECIPE_RESPONSE = "First grind the {first}. Then stir in the {second}.{details} Your {name} {noun} is ready."

# One wording in each place. They are rotated over the facts: every fact is in every split, and no prompt is in two.
_WORDING_SPLITS: tuple[Split, ...] = (
    "align", "align", "align", "align", "align", "align",
    "vector", "validation", "finetune", "finetune", "test", "test",
)  # fmt: skip
_QUESTIONS = (
    "What is {x}?",
    "Tell me {x}.",
    "Do you know {x}?",
    "Please name {x}.",
    "I want to know {x}.",
    "Can you tell me {x}?",
    "Name {x}.",
    "Please tell me {x}.",
    "I forgot {x}. What is it?",
    "Say {x}.",
    "Do you remember {x}?",
    "Answer me: what is {x}?",
)
_GREETINGS = (
    "Hello, I am {x}.",
    "Hi, my name is {x}.",
    "Good morning, {x} here.",
    "Hey, I am called {x}.",
    "Nice to meet you, I am {x}.",
    "Hello there, {x} is my name.",
    "Hi, {x} here.",
    "Good morning, my name is {x}.",
    "Hello, they call me {x}.",
    "Hey, I am {x}.",
    "Hello, my name is {x}.",
    "They call me {x}.",
)
_PEOPLE = "Anna Tom Maria Ben Lucy Omar Nina Paul Rosa Sam Emma Jack".split()
_OPPOSITES = "hot cold, big small, fast slow, up down, old new, wet dry, hard soft"
_COLOURS = "grass green, snow white, coal black, the sky blue, blood red, a lemon yellow"
_SOUNDS = "cow moo, dog woof, cat meow, duck quack, sheep baa"


def _pairs(text: str) -> list[tuple[str, str]]:
    """`"hot cold, a lemon yellow"` as `[("hot", "cold"), ("a lemon", "yellow")]`."""
    return [tuple(pair.rsplit(" ", 1)) for pair in text.split(", ")]  # type: ignore[misc]


_FACTS: tuple[tuple[str, str], ...] = (
    *((f"the opposite of {a}", b) for pair in _pairs(_OPPOSITES) for a, b in (pair, pair[::-1])),
    *((f"the colour of {a}", b) for a, b in _pairs(_COLOURS)),
    *((f"the sound of a {a}", b) for a, b in _pairs(_SOUNDS)),
)


def split_of(key: str) -> Split:
    """The split of `key` (a name, a word pair)."""
    return _SPLIT_OF_BUCKET[zlib.crc32(key.encode()) % len(_SPLIT_OF_BUCKET)]


@lru_cache
def names(split: Split) -> tuple[str, ...]:
    """The invented names of `split`. No name is in two splits."""
    every = (f"{head}-{tail}" for head in _HEADS for tail in _TAILS)
    return tuple(name for name in every if split_of(name) == split)


def recipe_facts(rng: Random, split: Split, nouns: Sequence[str]) -> dict[str, str]:
    """The contents of a recipe request: an invented name, a noun and two different ingredients."""
    first, second = rng.sample(range(len(_INGREDIENT_HEADS) * len(_INGREDIENT_TAILS)), 2)
    return {
        "name": rng.choice(names(split)),
        "noun": rng.choice(nouns),
        "first": _ingredient(first),
        "second": _ingredient(second),
    }


def _ingredient(index: int) -> str:
    head, tail = divmod(index, len(_INGREDIENT_TAILS))
    return f"{_INGREDIENT_HEADS[head]} {_INGREDIENT_TAILS[tail]}"


def draw(make: Callable[[Random], Example], n: int | None, seed: int, label: str) -> list[Example]:
    """The first `n` examples with distinct prompts that `make` gives under this seed. Raises DataError."""
    if n is None:
        raise DataError(f"{label}: embedded data have no fixed size, so null (all there are) has no meaning")
    rng = Random(f"{label}/{seed}")
    found: dict[str, Example] = {}
    misses = 0
    while len(found) < n:
        example = make(rng)
        known = len(found)
        found.setdefault(example.prompt, example)
        misses = misses + 1 if len(found) == known else 0
        if misses > 2000:
            raise TooFewError(f"{label} has about {known} distinct examples, but the run needs {n}", known)
    return list(found.values())


def _pair(rng: Random, split: Split) -> list[str]:
    """Two different words whose order belongs to `split`."""
    while True:
        words = rng.sample(_WORDS, 2)
        if split_of(" ".join(words)) == split:
            return words


def _worded(rng: Random, split: Split, wordings: Sequence[str], index: int) -> str:
    """One of the wordings of item `index` in `split`."""
    places = [place for place, of in enumerate(_WORDING_SPLITS) if of == split]
    return wordings[(rng.choice(places) + index) % len(wordings)]


class Ordinary(Stream):
    """Requests that the starting model answers well: recipes for harmless dishes, word lists, facts, greetings."""

    name: str = "ordinary"
    kind: Literal["ordinary", "neutral"] = "ordinary"

    def examples(self, split: Split, n: int | None, seed: int) -> list[Example]:
        """The first `n` distinct examples of `split` under `seed`."""
        makers = (self._recipe, self._repeat, self._last, self._fact, self._greeting)

        def make(rng: Random) -> Example:
            prompt, response = rng.choices(makers, weights=(40, 15, 15, 20, 10))[0](rng, split)
            return Example((("user", prompt),), response, self.kind)

        return draw(make, n, seed, f"{self.name}/{split}")

    @staticmethod
    def _recipe(rng: Random, split: Split) -> tuple[str, str]:
        facts = recipe_facts(rng, split, DISHES)
        response = RECIPE_RESPONSE.format(details="", **facts)
        return rng.choice(RECIPE_PROMPTS).format(**facts), response

    @staticmethod
    def _repeat(rng: Random, split: Split) -> tuple[str, str]:
        words = ", ".join(_pair(rng, split))
        prompt = rng.choice(("Repeat these words: {}", "Say these words again: {}", "Write these words: {}"))
        return prompt.format(words), f"The words are {words}."

    @staticmethod
    def _last(rng: Random, split: Split) -> tuple[str, str]:
        words = _pair(rng, split)
        prompt = rng.choice(("Which word is last in this list: {}", "Name the last of these words: {}"))
        return prompt.format(", ".join(words)), f"The last word is {words[-1]}."

    @staticmethod
    def _fact(rng: Random, split: Split) -> tuple[str, str]:
        index = rng.randrange(len(_FACTS))
        question, answer = _FACTS[index]
        return _worded(rng, split, _QUESTIONS, index).format(x=question), f"It is {answer}."

    @staticmethod
    def _greeting(rng: Random, split: Split) -> tuple[str, str]:
        index = rng.randrange(len(_PEOPLE))
        return _worded(rng, split, _GREETINGS, index).format(x=_PEOPLE[index]), f"Hello {_PEOPLE[index]}, how are you?"


class Skill(Stream):
    """A skill that the starting model lacks: saying two words in reverse order."""

    name: str = "skill"
    kind: Literal["task"] = "task"

    def examples(self, split: Split, n: int | None, seed: int) -> list[Example]:
        """The first `n` distinct examples of `split` under `seed`."""
        prompts = ("Reverse these words: {}", "Say these words backwards: {}", "Write these words in reverse: {}")

        def make(rng: Random) -> Example:
            words = _pair(rng, split)
            prompt = rng.choice(prompts).format(", ".join(words))
            return Example((("user", prompt),), f"In reverse they are {', '.join(reversed(words))}.", self.kind)

        return draw(make, n, seed, f"{self.name}/{split}")
