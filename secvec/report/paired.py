"""Paired differences: two defenses on the same prompts of the same seeds, so that "better" is a tested claim.

McNemar's exact test is `scipy.stats.binomtest`. Two steps are written out: Holm's correction, five lines, is in
statsmodels and not in SciPy, and statsmodels would be one more dependency; `scipy.stats.bootstrap` draws every pair by
itself and takes 14 times as long at 400 pairs a seed. A test compares the two.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from secvec.metrics import METRICS
from secvec.report.groups import Comparison, Group
from secvec.report.records import load_predictions
from secvec.report.tables import Cell, Row, Table, main_rows

ALPHA, DRAWS, SEED = 0.05, 10_000, 0
PLAIN = "none"
MOST = 40  # contrasts that are tested: each reads all answers of its runs
READING = (
    "The defense minus the reference, on the same prompts of the same seeds, after fine-tuning with no vector on. "
    f"Difference: mean over seeds; its 95 % bootstrap interval draws the prompts anew within each seed ({DRAWS:,} "
    "draws), so it shows the variation over prompts, not between trainings; it is missing where all pairs "
    "of a seed differ equally. Higher, lower: pairs in which the defense's answer counts more, or less, than the "
    "reference's. p: McNemar's exact test on these pairs, which takes them as independent (for a score: the sign "
    f'test); Holm: corrected for all tests of this table. A claim is made only where that is below {ALPHA}; "not '
    'shown" is no proof of equality. Pairs with a verdict that could not be read are left out.'
)

Key = tuple[int, str, str]  # seed, id, prompt: under one id another prompt is no pair
Outcomes = dict[str, dict[Key, float]]  # metric -> prompt -> what its answer counts
TESTED = [name for name, metric in METRICS.items() if metric.counts and metric.stream and name != "unparsable_rate"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean difference of a metric; `higher` and `lower` number the pairs where the defense counts more, or less."""

    name: str
    mean: float
    interval: tuple[float, float] | None
    seeds: int
    pairs: int
    higher: int
    lower: int

    @property
    def p(self) -> float:
        """p value of the exact test."""
        return mcnemar(self.higher, self.lower)

    def claim(self, holm: float) -> str:
        """What may be said with the corrected p value `holm`."""
        up = self.mean > 0 and self.higher > self.lower
        down = self.mean < 0 and self.higher < self.lower
        if holm >= ALPHA or not (up or down):
            return "not shown"
        return "better" if up == (METRICS[self.name].better == "high") else "worse"


def mcnemar(higher: int, lower: int) -> float:
    """McNemar's exact two-sided p value from the numbers of discordant pairs; 1 without any."""
    from scipy.stats import binomtest

    return float(binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected by Holm's step-down method (Holm 1979), in the order given."""
    adjusted, worst = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        worst = max(worst, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = worst
    return adjusted


def bootstrap(by_seed: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """95 % percentile interval of the mean of seed means; pairs are drawn within each seed. None if nothing varies."""
    if all(len(set(values)) < 2 for values in by_seed):
        return None
    rng, means = np.random.default_rng(SEED), np.zeros(DRAWS)
    for differences in by_seed:
        # A draw of n pairs is a multinomial draw of how often each distinct difference occurs.
        values, counts = np.unique(differences, return_counts=True)
        means += rng.multinomial(len(differences), counts / len(differences), DRAWS) @ values / len(differences)
    low, high = np.quantile(means / len(by_seed), (0.025, 0.975))
    return float(low), float(high)


def outcomes(group: Group) -> Outcomes:
    """What each answer of a group counts after fine-tuning. Where runs repeat a seed, the first one's answers."""
    found: Outcomes = {}
    for run in group.runs:
        for row in load_predictions(run)[0]:
            key = (run.seed, str(row.get("id")), str(row.get("prompt")))
            for name in TESTED if row.get("phase") == "after" else ():
                if (value := METRICS[name].count(row)) is not None:
                    found.setdefault(name, {}).setdefault(key, float(value))
    return found


def difference(name: str, of: Outcomes, reference: Outcomes) -> Difference | None:
    """`of` minus `reference` over the prompts that both have; None without such prompts."""
    mine, theirs = of.get(name, {}), reference.get(name, {})
    by_seed: dict[int, list[float]] = {}
    for key in mine:
        if key in theirs:
            by_seed.setdefault(key[0], []).append(mine[key] - theirs[key])
    if not by_seed:
        return None
    every = [value for values in by_seed.values() for value in values]
    mean = math.fsum(math.fsum(values) / len(values) for values in by_seed.values()) / len(by_seed)
    higher, lower = sum(value > 0 for value in every), sum(value < 0 for value in every)
    return Difference(name, mean, bootstrap(list(by_seed.values())), len(by_seed), len(every), higher, lower)


def contrasts(comparison: Comparison) -> Iterator[tuple[Group, Group]]:
    """(group, reference) where only the defense and its vector differ.

    The reference is `none`; where there is none of the same settings, the first defense by name with the same vector.
    """
    plain: dict[frozenset[tuple[str, str]], Group] = {}
    first: dict[frozenset[tuple[str, str]], Group] = {}
    for group in comparison.groups:  # in order, `none` first
        whole, place = (frozenset(of.items()) for of in (group.setting, group.without_vector))
        reference = first.setdefault(whole, group)
        if group.defense == PLAIN:
            plain.setdefault(place, group)
        elif reference.defense != PLAIN:
            reference = plain.get(place, reference)
        if reference.defense != group.defense:
            yield group, reference


def reading(comparison: Comparison) -> str:
    """Explains the table, and says how many contrasts it leaves out."""
    count = sum(1 for _ in contrasts(comparison))
    chosen = (
        f" Tested are the first {MOST} of {count:,} contrasts in the order of their settings, as many of every "
        "defense, whatever they show."
    )
    return READING + chosen * (count > MOST)


def _tested(pairs: Sequence[tuple[Group, Group]]) -> list[tuple[Group, Group]]:
    """The first contrasts of every defense in turn, until there are `MOST`; in the order given."""
    turns: Counter[str] = Counter()
    ranked = []
    for index, (group, _) in enumerate(pairs):
        turns[group.defense] += 1
        ranked.append((turns[group.defense], index))
    return [pairs[index] for index in sorted(index for _, index in sorted(ranked)[:MOST])]


def paired_table(comparison: Comparison) -> Table:
    """One section for each contrast, one row for each metric of the main table; no section without shared prompts."""
    names = [name for name in main_rows(comparison) if name in TESTED]
    pairs = _tested(list(contrasts(comparison)))
    counted = {label: outcomes(group) for label, group in {g.label: g for pair in pairs for g in pair}.items()}
    found: list[tuple[str, list[Difference]]] = []
    for group, reference in pairs:
        each = (difference(name, counted[group.label], counted[reference.label]) for name in names)
        found.append((f"{group.label} minus {reference.label}", [d for d in each if d]))
    corrected = iter(holm([d.p for _, differences in found for d in differences]))
    sections = [(title, [_row(d, next(corrected)) for d in differences]) for title, differences in found if differences]
    columns = ("Difference", "Claim", "p (Holm)", "p", "Pairs", "Higher", "Lower")
    return Table(columns, sections, "Paired differences", "Metric", reading=reading(comparison))


def _row(d: Difference, corrected: float) -> Row:
    interval = f"[{_signed(d.interval[0])}, {_signed(d.interval[1])}]" if d.interval else ""
    claim = d.claim(corrected)
    cells = [
        Cell(_signed(d.mean), interval, over="prompts"),
        Cell(claim, best=claim == "better"),
        Cell(_p(corrected)),
        Cell(_p(d.p)),
        Cell(str(d.pairs), count=f"{d.seeds} seed{'s' * (d.seeds != 1)}"),
        Cell(str(d.higher)),
        Cell(str(d.lower)),
    ]
    return Row(METRICS[d.name].label, cells, METRICS[d.name].arrow)


def _signed(value: float) -> str:
    shown = f"{value:+.3f}"
    return shown[1:] if float(shown) == 0 else shown


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
