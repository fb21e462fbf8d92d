"""Where the numbers come from, and what should make a reader careful."""

from collections.abc import Iterable, Sequence

from secvec.errors import several
from secvec.report.groups import Comparison
from secvec.report.records import RecordedRun
from secvec.runs.record import UNKNOWN


def provenance(runs: Sequence[RecordedRun]) -> list[tuple[str, str]]:
    """(name, value) pairs over all runs; differing values are all named."""
    commits = [(run.record.commit or UNKNOWN)[:12] + " (uncommitted changes)" * run.record.dirty for run in runs]
    created = sorted(run.record.created for run in runs if run.record.created)
    seeds = sorted({run.seed for run in runs if run.completed})
    done = sum(run.completed for run in runs)
    return [
        ("Runs", f"{done} completed" + (f", {len(runs) - done} not completed" if done < len(runs) else "")),
        ("Behavior", _distinct(run.record.behavior for run in runs)),
        ("Model", _distinct(run.model for run in runs)),
        ("Tuning", _distinct(run.record.tune for run in runs)),
        ("Seeds", f"{len(seeds)} ({', '.join(map(str, seeds))})" if seeds else "none completed"),
        ("Data", _counts(runs) or "not recorded"),
        ("Commit", _distinct(commits)),
        ("Versions", _distinct(_versions(run) for run in runs if run.record.versions) or "not recorded"),
        ("Created", " to ".join(dict.fromkeys((created[0], created[-1]))) if created else "not recorded"),
    ]


def sentence(runs: Sequence[RecordedRun], comparison: Comparison) -> str:
    """What is compared, in one sentence."""
    seeds = len({run.seed for run in runs if run.completed})
    names = [group.label for group in comparison.groups]
    if not names:
        return "No run was completed, so there is nothing to compare."
    model = _distinct(run.model for run in runs if run.completed)
    behavior = _distinct(run.record.behavior for run in runs if run.completed)
    count = f"{seeds} seed{'s' * (seeds != 1)}"
    versus = " versus ".join(names) if len(names) < 4 else f"{len(names)} settings"
    return (
        f"The model {model} is fine-tuned on data that also contains the undesired behavior {behavior}: {versus}, "
        f"over {count}, beside the base model before fine-tuning."
    )


def warnings(runs: Sequence[RecordedRun], comparison: Comparison) -> list[str]:
    """What limits the comparison."""
    done = [run for run in runs if run.completed]
    found = []
    for name, what in (("commit", "code (commits differ)"), ("versions", "library versions")):
        if len({str(getattr(run.record, name)) for run in done}) > 1:
            found.append(f"The completed runs do not share their {what}.")
    if any(run.record.dirty for run in done):
        found.append("Some runs used code with uncommitted changes.")
    seeds = {group.label: {run.seed for run in group.runs} for group in comparison.groups}
    if len({frozenset(s) for s in seeds.values()}) > 1:
        each = "; ".join(several([f"{label}: {', '.join(map(str, sorted(s)))}" for label, s in seeds.items()], 8))
        found.append(f"The groups do not have the same seeds ({each}).")
    if seeds and max(map(len, seeds.values())) == 1:
        found.append("One seed only: the intervals tell of the prompts drawn, not of the spread between trainings.")
    wrong = [(run, name) for run in done for name in run.record.metrics if not run.measurement(name)]
    found += several([f"{run.name}: {name} is no number, and its mean leaves it out." for run, name in wrong], 8)
    bare = [run for run in done if not run.has("after/")]
    lines = [f"{run.name} has no metrics after fine-tuning (stage: {run.record.stage})." for run in bare]
    return found + several(lines, 8)


def failures(runs: Iterable[RecordedRun]) -> list[tuple[RecordedRun, str]]:
    """Runs that did not complete, with the reason they recorded."""
    unknown = "no error recorded: it is still running, or was ended from outside"
    return [(run, run.record.error or unknown) for run in runs if not run.completed]


def _counts(runs: Sequence[RecordedRun]) -> str:
    """Number of examples of each split; differing ones are all named."""
    splits: dict[str, list[str]] = {}
    for run in runs:
        for split, counts in run.record.data.counts.items():
            splits.setdefault(split, []).append(", ".join(f"{n} {kind}" for kind, n in counts.items()))
    return "; ".join(f"{split}: {_distinct(texts)}" for split, texts in sorted(splits.items()))


def _versions(run: RecordedRun) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(run.record.versions.items()))


def _distinct(values: Iterable[str]) -> str:
    return " / ".join(several(sorted(set(values)), 12))
