"""Mean over seeds with its 95 % interval, and the comparison of such means."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit

from secvec.metrics import Measurement, Metric


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean of seed means. `kind`: "seeds" Student t over seeds, "own" the records' own interval, "none" no interval."""

    mean: float
    low: float
    high: float
    by_seed: tuple[tuple[int, float], ...]
    prompts: tuple[int, int] | None
    kind: str


def estimate(measured: Iterable[tuple[int, Measurement]], metric: Metric) -> Estimate | None:
    """The estimate from `(seed, measurement)` pairs; those that share a seed are averaged first; None without any."""
    pairs = list(measured)
    if not pairs:
        return None
    seeds = sorted({seed for seed, _ in pairs})
    means = [fmean(m.value for s, m in pairs if s == seed) for seed in seeds]
    mean, count = fmean(means), len(means)
    spread = stdev(means) if count > 1 else 0.0
    if spread > 1e-12:
        half = float(stdtrit(count - 1, 0.975)) * spread / math.sqrt(count)
        low, high, kind = mean - half, mean + half, "seeds"
    else:
        # One seed has no spread to measure; seeds that agree exactly would give an interval without width, which
        # claims more than e.g. three times 0 of 100 can tell. Both take the interval over prompts.
        # Records of older versions hold intervals without width, too.
        ends = [(m.ci_low, m.ci_high) for _, m in pairs if m.ci_low is not None and m.ci_high is not None]
        own = [(low, high) for low, high in ends if low < high]
        known = len(own) == len(pairs)
        low, high, kind = (min(own)[0], max(high for _, high in own), "own") if known else (mean, mean, "none")
    floor, ceiling = metric.bounds
    counts = [m.n for _, m in pairs if m.over_prompts]
    prompts = (min(counts), max(counts)) if counts else None
    low, high = min(max(low, floor), ceiling), max(min(high, ceiling), floor)
    return Estimate(mean, low, high, tuple(zip(seeds, means, strict=True)), prompts, kind)


def best_of(estimates: Sequence[Estimate | None], metric: Metric) -> int | None:
    """Index of the one estimate that is best with an interval that meets no other's; None if there is no such one."""
    known = [(index, e) for index, e in enumerate(estimates) if e is not None]
    if metric.better is None or len(known) < 2 or any(e.kind == "none" for _, e in known):
        return None
    ranked = sorted((_rank(e, metric), index) for index, e in known)
    ((_, _, worst_of_best), best), others = ranked[0], ranked[1:]
    return best if all(low > worst_of_best for (_, low, _), _ in others) else None


def _rank(e: Estimate, metric: Metric) -> tuple[float, float, float]:
    """Mean and interval turned so that lower is better."""
    if metric.better == "high":
        return -e.mean, -e.high, -e.low
    if metric.better == "zero":
        nearest = 0.0 if e.low <= 0 <= e.high else min(abs(e.low), abs(e.high))
        return abs(e.mean), nearest, max(abs(e.low), abs(e.high))
    return e.mean, e.low, e.high
