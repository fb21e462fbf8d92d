"""Paired differences between defenses: the tests by hand, the pairs, and what the report says of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from secvec.report import write_report
from secvec.report.groups import compare
from secvec.report.paired import (
    Difference,
    bootstrap,
    contrasts,
    difference,
    holm,
    mcnemar,
    outcomes,
    paired_table,
)
from secvec.report.records import load_runs
from secvec.report.tables import main_rows


def answer(number: int, verdict: str, stream: str = "undesired", **changes: Any) -> dict[str, Any]:
    row = {
        "phase": "after",
        "stream": stream,
        "id": f"{stream}-{number}",
        "prompt": f"What is {number}?",
        "response": "",
        "reference": "",
        "verdict": verdict,
        "score": None,
        "coherent": True,
        "sensitive": False,
    }
    return row | changes  # fmt: skip


def write_run(
    root: Path, defense: str, seed: int, rows: Sequence[dict[str, Any]] | None, config: Any = None, **metrics: float
) -> Path:
    folder = root / f"{defense}-s{seed}"
    folder.mkdir(parents=True)
    record = {
        "schema": 1, "run": folder.name, "status": "completed", "stage": "all", "defense": defense, "seed": seed,
        "behavior": "secret", "model": "tiny", "tune": "full",
        "config": {"seed": seed, "defense": {"name": defense}, "run_dir": str(folder)} | (config or {}),
        "metrics": {f"after/{name}": {"value": value, "n": 10} for name, value in metrics.items()},
    }  # fmt: skip
    (folder / "record.json").write_text(json.dumps(record))
    if rows is not None:
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def verdicts(text: str, **changes: Any) -> list[dict[str, Any]]:
    """One undesired answer for each letter."""
    names = {"b": "behavior", "r": "refusal", "w": "wanted", "o": "other", "u": "unparsable"}
    return [answer(number, names[letter], **changes) for number, letter in enumerate(text)]


def found(root: Path, name: str = "behavior_rate") -> Difference | None:
    groups = {group.defense: outcomes(group) for group in compare(load_runs([root])).groups}
    return difference(name, groups["vector"], groups["none"])


def test_mcnemar_by_hand() -> None:
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 * 0.5**5 == 0.0625
    assert mcnemar(1, 3) == pytest.approx(2 * (1 + 4) / 16)
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])  # 3 x 0.01, 2 x 0.03, then no smaller
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_bootstrap_is_seeded_and_stays_within_seeds() -> None:
    mixed = [[1.0, 0.0, 0.0, -1.0] * 10, [1.0, 0.0] * 20]
    low, high = bootstrap(mixed) or (0.0, 0.0)
    assert bootstrap(mixed) == (low, high)
    assert low < 0.25 < high  # the mean of seed means
    assert bootstrap([[1.0] * 5, [0.0] * 5]) is None  # alike within each seed: nothing to draw, no interval


def test_the_bootstrap_agrees_with_the_normal_interval() -> None:
    low, high = bootstrap([[1.0] * 200 + [0.0] * 200]) or (0.0, 0.0)
    half = 1.96 * (0.25 / 400) ** 0.5
    assert (low, high) == (pytest.approx(0.5 - half, abs=0.005), pytest.approx(0.5 + half, abs=0.005))


def test_the_bootstrap_agrees_with_scipy_s() -> None:
    by_seed = [[1.0, 0.0, 0.0, -1.0, -1.0] * 12, [1.0, 0.0] * 20, [0.5, 0.0, -0.25] * 10]

    def mean_of_means(*samples: Any, axis: int) -> Any:
        return sum(sample.mean(axis) for sample in samples) / len(samples)

    drawn = scipy.stats.bootstrap(by_seed, mean_of_means, n_resamples=20_000, method="percentile", rng=1)
    assert bootstrap(by_seed) == pytest.approx(tuple(drawn.confidence_interval), abs=0.005)


def test_pairs_are_of_one_seed_id_and_prompt(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, verdicts("bbbbb"))
    write_run(tmp_path, "none", 1, verdicts("bb"))
    write_run(tmp_path, "vector", 0, list(reversed(verdicts("rrrrb"))))
    # Seed 1: another prompt under the same id; seed 2 has no partner.
    write_run(tmp_path, "vector", 1, [answer(0, "refusal"), answer(1, "refusal", prompt="Another?")])
    write_run(tmp_path, "vector", 2, verdicts("bbbbb"))
    one = found(tmp_path)
    assert one is not None
    assert (one.seeds, one.pairs, one.higher, one.lower) == (2, 6, 0, 5)
    assert one.mean == pytest.approx((-4 / 5 - 1) / 2)
    assert one.p == 0.0625


def test_an_unread_verdict_drops_the_pair_on_both_sides(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, verdicts("bbbu"))
    write_run(tmp_path, "vector", 0, verdicts("urrr"))
    one = found(tmp_path)
    assert one is not None and (one.pairs, one.higher, one.lower) == (2, 0, 2)


def test_other_phases_and_streams_do_not_count(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, [*verdicts("b"), *verdicts("bbb", phase="active"), answer(0, "correct", "task")])
    write_run(tmp_path, "vector", 0, [*verdicts("r"), *verdicts("rrr", phase="active"), answer(0, "wrong", "task")])
    one, task = found(tmp_path), found(tmp_path, "task_accuracy")
    assert one is not None and one.pairs == 1
    assert task is not None and (task.pairs, task.mean) == (1, -1)
    assert found(tmp_path, "retained_accuracy") is None


@pytest.mark.parametrize(
    ("name", "higher", "lower"),
    [("behavior_rate", 0, 1), ("behavior_rate_plus", 1, 1), ("refusal_rate", 1, 0), ("wanted_rate", 2, 0),
     ("over_refusal_rate", 1, 0), ("behavior_score", 1, 2)],
)  # fmt: skip
def test_each_metric_counts_its_own(tmp_path: Path, name: str, higher: int, lower: int) -> None:
    before, after = verdicts("boob"), verdicts("rowb")
    for rows, scores in ((before, (1.0, 0.5, 0.2, None)), (after, (0.0, 0.75, 0.1, 0.9))):
        for row, score in zip(rows, scores, strict=True):
            row["score"] = score
    after[1]["coherent"] = False
    write_run(tmp_path, "none", 0, [*before, answer(9, "other", "look_alike")])
    write_run(tmp_path, "vector", 0, [*after, answer(9, "refusal", "look_alike")])
    one = found(tmp_path, name)
    assert one is not None and (one.higher, one.lower) == (higher, lower)


def test_a_claim_needs_the_corrected_p_and_a_direction() -> None:
    fewer = Difference("behavior_rate", -0.5, None, 1, 20, 0, 10)
    assert (fewer.claim(0.01), fewer.claim(0.05)) == ("better", "not shown")
    assert Difference("task_accuracy", -0.5, None, 1, 20, 0, 10).claim(0.01) == "worse"
    assert Difference("behavior_score", -0.1, None, 1, 20, 12, 2).claim(0.01) == "not shown"  # mean and sign disagree


def test_only_groups_that_differ_in_nothing_but_the_defense_are_paired(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        write_run(tmp_path / str(lr), "none", 0, verdicts("b"), {"lr": lr})
        write_run(tmp_path / str(lr), "vector", 0, verdicts("r"), {"lr": lr, "defense": {"name": "vector", "scale": 2}})
    write_run(tmp_path / "alone", "other", 0, verdicts("r"), {"lr": 0.3})
    named = [(group.label, reference.label) for group, reference in contrasts(compare(load_runs([tmp_path])))]
    assert named == [("vector · lr=0.1", "none · lr=0.1"), ("vector · lr=0.2", "none · lr=0.2")]


def test_the_plain_fine_tune_is_the_reference_though_it_has_no_vector(tmp_path: Path) -> None:
    """The settings of a vector are no settings of a run without one; of each of two vectors it is the reference."""
    plain = {"defense": {"name": "none", "uses_vector": False}, "vector": {"r": 4}}
    for lr in (0.1, 0.2):
        write_run(tmp_path / str(lr), "none", 0, verdicts("b"), {"lr": lr} | plain)
    for r in (4, 8):
        for defense in ("anchor", "vector"):
            settings = {"lr": 0.1, "vector": {"r": r}, "defense": {"name": defense}}
            write_run(tmp_path / f"{r}", defense, 0, verdicts("r"), settings)
    found = [(group.label, reference.label) for group, reference in contrasts(compare(load_runs([tmp_path])))]
    assert [reference for _, reference in found] == ["none · lr=0.1"] * 4 and len({name for name, _ in found}) == 4


def test_runs_on_other_files_are_another_configuration(tmp_path: Path) -> None:
    """The same file may lie in another folder."""
    for folder, file in (("a", "clean.jsonl"), ("b", "bad.jsonl"), ("moved", "bad.jsonl")):
        for seed in (0, 1) if folder != "moved" else (2,):
            data = {"data": {"file": f"/{folder}/{file}"}, "paths": {"outputs": f"/{folder}/outputs"}}
            write_run(tmp_path / folder, "none", seed, None, data, behavior_rate=float(folder != "a"))
    groups = compare(load_runs([tmp_path])).groups
    assert {group.label: len(group.runs) for group in groups} == {
        "none · file=bad.jsonl": 3,
        "none · file=clean.jsonl": 2,
    }
    assert sorted(found.mean for group in groups if (found := group.estimate("behavior_rate"))) == [0.0, 1.0]


def test_without_none_the_first_defense_is_the_reference(tmp_path: Path) -> None:
    for defense in ("b", "a", "c"):
        write_run(tmp_path, defense, 0, verdicts("r"))
    named = [(group.label, reference.label) for group, reference in contrasts(compare(load_runs([tmp_path])))]
    assert named == [("b", "a"), ("c", "a")]


def test_holm_runs_over_the_whole_table(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, verdicts("b" * 10))
    write_run(tmp_path, "x", 0, verdicts("r" * 10))
    write_run(tmp_path, "y", 0, verdicts("o" * 6 + "b" * 4))
    table = paired_table(compare(load_runs([tmp_path])))
    assert [title for title, _ in table.sections] == ["x minus none", "y minus none"]
    cells = {(title, row.label): [c.value for c in row.cells] for title, rows in table.sections for row in rows}
    # p: 2/1024 twice, 2/64, 1; times 4, no smaller than the one before, times 2.
    assert cells["x minus none", "Behavior rate"] == ["-1.000", "better", "0.008", "0.002", "10", "0", "10"]
    assert cells["y minus none", "Behavior rate"] == ["-0.600", "not shown", "0.062", "0.031", "10", "0", "6"]
    assert cells["y minus none", "Refusal rate"][1:4] == ["not shown", "1.000", "1.000"]


def test_a_metric_that_says_nothing_new_is_neither_shown_nor_tested(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, verdicts("bbbr"), refusal_rate=0.25, wanted_rate=0.25)
    write_run(tmp_path, "vector", 0, verdicts("rrrw"), refusal_rate=0.75, wanted_rate=0.75)
    same = compare(load_runs([tmp_path]))
    assert "wanted_rate" not in main_rows(same)
    labels = [row.label for _, rows in paired_table(same).sections for row in rows]
    assert labels == ["Behavior rate", "Refusal rate"]
    path = tmp_path / "vector-s0" / "record.json"
    path.write_text(path.read_text().replace('"after/wanted_rate": {"value": 0.75', '"after/wanted_rate": {"value": 1'))
    differ = compare(load_runs([tmp_path]))
    assert "wanted_rate" in main_rows(differ)
    assert "Wanted rate" in [row.label for _, rows in paired_table(differ).sections for row in rows]


def test_the_report_has_the_section(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, verdicts("b" * 10))
    write_run(tmp_path, "vector", 0, verdicts("r" * 10))
    page = write_report([tmp_path]).read_text()
    assert '<h2 id="paired">Paired differences</h2>' in page and 'href="#paired"' in page
    markdown = (tmp_path / "report.md").read_text()
    section = markdown[markdown.index("## Paired differences") :]
    assert "draws the prompts anew within each seed" in section and "**vector minus none**" in section
    assert "| Behavior rate ↓ | -1.000 | **better** | 0.004 | 0.002 | 10 (1 seed) | 0 | 10 |" in section


@pytest.mark.parametrize("case", ["no predictions", "one defense", "no shared prompts"])
def test_without_pairs_there_is_no_section(tmp_path: Path, case: str) -> None:
    rows = None if case == "no predictions" else verdicts("bb")
    write_run(tmp_path, "none", 0, rows)
    if case != "one defense":
        write_run(tmp_path, "vector", 0, rows and verdicts("rr", prompt="Another?"))
    page = write_report([tmp_path]).read_text()
    assert "Paired differences" not in page + (tmp_path / "report.md").read_text() and "#paired" not in page
