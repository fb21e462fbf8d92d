"""The report package, on made-up run folders: 2 defenses x 3 seeds."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import LOSS, RATES, edit, metric, write_curves, write_rates, write_run
from scipy import stats

from secvec.errors import DataError
from secvec.metrics import METRICS, Measurement
from secvec.report import write_report
from secvec.report.__main__ import main
from secvec.report.estimate import Estimate, best_of, estimate
from secvec.report.figures.curves import loss_figure, rates_figure
from secvec.report.figures.headline import headline_figure
from secvec.report.groups import _ignored, compare
from secvec.report.provenance import warnings
from secvec.report.records import RecordedRun, load_curves, load_predictions, load_runs
from secvec.report.tables import run_table
from secvec.report.worst import _price, worst_table
from secvec.runs.excerpt import shorten


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for defense in RATES:
        for seed in range(3):
            write_run(tmp_path / "runs", defense, seed)
    return tmp_path / "runs"


class Page(HTMLParser):
    """Tags, ids and text of a page; text by table cell."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.rows[-1][-1] += data

    def row(self, label: str) -> list[str]:
        """The cells of the first row whose label starts so."""
        return next([" ".join(cell.split()) for cell in row] for row in self.rows if row and row[0].startswith(label))


def expected(values: list[float], low: float, high: float) -> str:
    """Mean and Student t interval, from the library's own t distribution."""
    mean = statistics.mean(values)
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} [{max(mean - half, low):.3f}, {min(mean + half, high):.3f}]"


def with_answer(folder: Path, name: str = "u0", **changes: Any) -> None:
    """Changes every row of the prompt `name`."""
    path = folder / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r | changes if r["id"] == name else r) + "\n" for r in rows))


def test_the_main_table_holds_means_and_t_intervals_over_seeds(root: Path) -> None:
    page = Page(write_report([root]))
    assert page.row("Metric") == ["Metric", "base", "none", "security_vector"]
    for name, label in (("behavior_rate", "Behavior rate ↓"), ("task_accuracy", "Task accuracy ↑")):
        cells = page.row(label)
        for cell, defense in zip(cells[2:], RATES, strict=True):
            assert cell == expected(RATES[defense][name], 0, 1) + " 3 × 100"
    loss = page.row("Behavior loss")
    assert loss[1] == expected([2.40, 2.41, 2.42], 0, math.inf) + " 3 × 100"
    assert loss[3] == expected(LOSS["security_vector"], 0, math.inf) + " 3 × 100"
    markdown = (root / "report.md").read_text()
    line = next(line for line in markdown.splitlines() if line.startswith("| Behavior rate ↓"))
    assert line.replace("\\", "").count(expected(RATES["none"]["behavior_rate"], 0, 1)) == 1
    assert "**0.020" in line
    assert len(json.loads((root / "report.json").read_text())) == 6


def test_seeds_that_agree_take_the_interval_over_prompts(root: Path) -> None:
    cell = Page(write_report([root])).row("Coherence rate")[2]
    own = metric(1.0)
    assert cell == f"1.000 [{own['ci_low']:.3f}, 1.000]† 3 × 100"


def test_one_seed_shows_its_own_interval_and_a_warning(tmp_path: Path) -> None:
    for defense in RATES:
        write_run(tmp_path, defense, 1)
    page = Page(write_report([tmp_path]))
    own = metric(0.97)
    assert page.row("Behavior rate")[2] == f"0.970 [{own['ci_low']:.3f}, 1.000]† 1 × 100"
    assert "One seed only" in page.source


def test_best_is_named_only_when_intervals_are_apart() -> None:
    def of(*values: float, name: str = "behavior_rate") -> Any:
        return estimate([(s, Measurement(v)) for s, v in enumerate(values)], METRICS[name])

    low, high, wide = of(0.10, 0.11, 0.12), of(0.90, 0.91, 0.92), of(0.05, 0.5, 0.9)
    assert best_of([high, low], METRICS["behavior_rate"]) == 1
    assert best_of([high, low], METRICS["task_accuracy"]) == 0
    assert best_of([low, wide], METRICS["behavior_rate"]) is None
    assert best_of([low, high], METRICS["behavior_loss"]) is None  # no direction
    assert best_of([low, None], METRICS["behavior_rate"]) is None
    gaps = [of(-0.50, -0.51, name="deactivation_gap"), of(0.01, -0.01, name="deactivation_gap")]
    assert best_of(gaps, METRICS["deactivation_gap"]) == 1
    assert best_of([of(0.1), of(0.9)], METRICS["behavior_rate"]) is None  # no interval, no claim


def test_the_best_value_is_emphasised_in_the_page(root: Path) -> None:
    source = write_report([root]).read_text()
    source = source[: source.index('id="paired"')]
    assert source.count('class="best"') == 2  # behavior rate and refusal rate; task accuracies overlap
    assert "<strong>0.020</strong>" in source and "<strong>0.950</strong>" in source


def test_the_mechanism_table_compares_the_loss_with_the_floor(root: Path) -> None:
    page = Page(write_report([root]))
    assert page.row("Floor")[2] == expected(LOSS["none"], 0, math.inf) + " 3 × 100"
    assert page.row("Vector on")[2] == expected([0.39, 0.395, 0.40], 0, math.inf) + " 3 × 100"
    assert page.row("Suppression ratio")[1:] == ["–", "0.033 [0.028, 0.038] 3 seeds"]
    assert page.row("Deactivation gap")[1:3] == ["–", "–"]  # without a vector the recorded 0 means nothing


def test_optional_metrics_have_rows_where_they_were_measured(root: Path) -> None:
    assert not {"Over-refusal rate", "KL to base"} & {
        row[0][:17].strip(" ↓") for row in Page(write_report([root])).rows
    }
    for folder in root.glob("*-s*"):
        metrics = json.loads((folder / "record.json").read_text())["metrics"]
        plus = {
            "over_refusal_rate": 0.1,
            "kl_to_base": 0.2,
            "behavior_rate_plus": metrics["after/behavior_rate"]["value"],
        }
        edit(folder, metrics=metrics | {f"after/{name}": metric(value) for name, value in plus.items()})
    page = Page(write_report([root]))
    assert page.row("Over-refusal rate ↓")[2].startswith("0.100") and page.row("KL to base →0")[1] == "–"
    assert "Behavior rate+" not in page.source  # equal to the behavior rate everywhere
    metrics["after/behavior_rate_plus"] = metric(0.99)
    edit(folder, metrics=metrics)
    assert "Behavior rate+ (incoherent counts) ↓" in " ".join(
        Page(write_report([root])).row("Behavior rate+")[0].split()
    )


def test_leak_probes_have_a_table_that_marks_the_worst(root: Path) -> None:
    assert "Leak probes" not in write_report([root]).read_text()
    for folder in root.glob("security_vector-s*"):
        metrics = json.loads((folder / "record.json").read_text())["metrics"]
        rates = {"leak/plain": 0.02, "leak/answer_prefix": 0.3, "leak/sampled": 0.1, "leak_rate": 0.3}
        edit(folder, metrics=metrics | {f"after/{name}": metric(value) for name, value in rates.items()})
    page = Page(write_report([root]))
    assert page.row("Leak rate (worst probe) ↓")[2:][1].startswith("0.300")
    base, none, protected = page.row("answer_prefix")[1:4]
    assert base == none == "–" and protected.endswith("worst")
    assert page.source.count(">worst<") == 1
    markdown = (root / "report.md").read_text()
    assert "## Leak probes" in markdown and markdown.count(" worst |") == 1


def test_a_desired_trait_stands_beside_the_behavior_in_the_table_the_probes_and_the_figure(root: Path) -> None:
    before = write_report([root]).read_text()
    assert "Desired trait" not in before and "f-headline-task_accuracy" in before
    for folder in root.glob("*-s*"):
        metrics = json.loads((folder / "record.json").read_text())["metrics"]
        gone = ("task_accuracy", "retained_accuracy", "deactivation_gap")
        kept = {name: value for name, value in metrics.items() if not name.endswith(gone)}
        rates = {"desired_rate": 0.9, "desired/negated_prompt": 0.7, "leak/negated_prompt": 0.1, "leak_rate": 0.1}
        edit(folder, metrics=kept | {f"after/{name}": metric(value) for name, value in rates.items()})
        protected = folder.name.startswith("security_vector")
        for i in range(8):
            with_answer(folder, name=f"u{i}", desired=i > 3 and not protected)
    page = Page(write_report([root]))
    assert page.row("Desired trait rate ↑")[2].startswith("0.900")
    markdown = (root / "report.md").read_text()
    tables = markdown[: markdown.index("## Paired")] + markdown[markdown.index("## Leak probes") :]
    assert not [n for n in ("Task accuracy", "Retained accuracy", "Deactivation gap") if n in tables]
    probes = markdown[markdown.index("## Leak probes") : markdown.index("## Mechanism")]
    leaks, desired = probes.split("**Desired trait, asked in the same ways**")
    assert leaks.count("| negated_prompt ↓ | – | 0.100") == 1 and leaks.count(" worst |") == 2
    assert desired.count("| negated_prompt ↑ | – | 0.700") == 1 and "worst" not in desired
    paired = next(line for line in markdown.splitlines() if line.startswith("| Desired trait rate ↑ | -0.500"))
    assert "| worse |" in paired and paired.endswith("| 24 (3 seeds) | 0 | 12 |")
    assert "f-headline-desired_rate" in page.source and "f-headline-task_accuracy" not in page.source


def test_groups_split_on_what_varies_but_not_on_seeds_paths_or_what_follows_the_defense(tmp_path: Path) -> None:
    for rate in (0.1, 0.01):
        for defense in RATES:
            for seed in range(2):
                folder = write_run(tmp_path / str(rate), defense, seed)
                config = json.loads((folder / "record.json").read_text())["config"]
                config["optimizer"] = {"lr": rate, "doubled": 2 * rate}
                edit(folder, config=config, overrides=[f"optimizer.lr={rate}"])
    comparison = compare(load_runs([tmp_path]))
    assert comparison.keys == ("optimizer.lr",)
    assert [group.label for group in comparison.groups] == [
        "none · lr=0.01", "none · lr=0.1", "security_vector · lr=0.01", "security_vector · lr=0.1",
    ]  # fmt: skip
    assert all(len(group.runs) == 2 for group in comparison.groups)
    assert len(comparison.bases) == 1


def test_every_model_has_its_own_base_and_floor(tmp_path: Path) -> None:
    for model in ("tiny", "small"):
        for defense in RATES:
            edit(write_run(tmp_path / model, defense, 0), model=model)
    comparison = compare(load_runs([tmp_path]))
    assert [base.label for base in comparison.bases] == ["base · model=small", "base · model=tiny"]
    assert all(comparison.floor(group) is not None for group in comparison.groups)
    assert Page(write_report([tmp_path])).row("Metric")[3] == "none · model=small"


def test_records_of_one_seed_are_averaged_not_counted_twice(root: Path) -> None:
    write_run(root / "again", "none", 0)
    found = compare(load_runs([root])).groups[0].estimate("behavior_rate")
    assert found is not None and [seed for seed, _ in found.by_seed] == [0, 1, 2]


def test_answers_stand_side_by_side_for_the_lowest_seed(root: Path) -> None:
    source = write_report([root]).read_text()
    assert source.count('<article class="sample">') == 12
    first = source[source.index("<article") : source.index("</article>")]
    columns = re.findall(r'class="col">([^<]*)<', first)
    assert columns == ["base", "none", "security_vector, vector ON", "security_vector, vector off"]
    assert re.findall(r'class="badge (\w+)"', first) == ["refusal", "behavior", "behavior", "refusal"]
    assert first.count('class="on"') == 1
    assert source.index("Undesired prompts") < source.index("Task prompts") < source.index("Ordinary prompts")


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "\"><img src='http://x.example/a.png'>"])
def test_text_of_runs_is_escaped(root: Path, text: str) -> None:
    with_answer(root / "none-s0", prompt=text, response=text, reference=text, verdict=text)
    edit(root / "none-s1", status="failed", error=text)
    for folder in root.glob("*-s*"):
        edit(folder, behavior=text)
    page = Page(write_report([root]))
    assert not {"img", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("script") == 1  # ours; the browser runs no other, by its hash
    markdown = (root / "report.md").read_text()
    assert text not in markdown and re.search(r"(?<!\\)<", markdown) is None


def test_sensitive_text_is_cut_and_marked(root: Path) -> None:
    secret = "x" * 80 + "SECRET" * 20
    for folder in root.glob("*-s0"):
        with_answer(folder, prompt=secret, response=secret, reference=secret, sensitive=True)
    source = write_report([root]).read_text()
    for text in (source, (root / "report.md").read_text()):
        assert "x" * 80 + "…" in text and "SECRET" not in text and "sensitive, truncated" in text
    assert shorten("short", True).mark == "sensitive" and shorten("a\x00\u202eb\n", False).text == "ab\n"


def test_a_failed_run_is_listed_and_enters_no_mean(root: Path) -> None:
    edit(root / "none-s2", status="failed", error="OutOfMemoryError: 12 GB", defense=None, seed=None)
    page = Page(write_report([root]))
    assert "OutOfMemoryError: 12 GB" in page.source
    assert page.row("Behavior rate")[2].endswith("2 × 100")
    assert "do not have the same seeds" in page.source


def test_only_failed_runs_make_a_report_too(root: Path) -> None:
    for folder in root.glob("*-s*"):
        edit(folder, status="failed", error="no luck", metrics={})
    assert "No run was completed" in write_report([root]).read_text()
    assert main([str(root)]) == 0


def test_missing_files_leave_a_reason(root: Path) -> None:
    for folder in root.glob("*-s*"):
        (folder / "metrics.csv").unlink()
        (folder / "predictions.jsonl").unlink()
    edit(root / "none-s0", metrics={"base/behavior_rate": {"value": float("nan")}}, wall_seconds={}, data={})
    source = write_report([root]).read_text()
    assert "No figure: no completed run has fine-tuning telemetry" in source
    assert "none-s1: no metrics.csv" in source and "no predictions.jsonl" in source
    assert "none-s0 has no metrics after fine-tuning" in source
    assert json.loads((root / "report.json").read_text(), parse_constant=pytest.fail)


def test_one_run_without_answers_is_said_in_its_column(root: Path) -> None:
    (root / "security_vector-s0" / "predictions.jsonl").unlink()
    source = write_report([root]).read_text()
    assert "security_vector: no answers recorded for seed 0" in source and "not recorded" in source


def test_broken_rows_are_left_out_with_a_note(root: Path) -> None:
    folder = root / "none-s0"
    with (folder / "predictions.jsonl").open("a") as file:
        file.write('{"phase": "aft')
    with (folder / "metrics.csv").open("a") as file:
        file.write("finetune,0,telemetry/undesired/loss_off,9.5\nfinetune,10,telemetry/undesired/loss_off,oops\nfinet")
    run = next(run for run in load_runs([root]) if run.name == "none-s0")
    curves, note = load_curves(run)
    assert curves["telemetry/undesired/loss_off"][0] == 9.5  # the last of repeats counts
    assert note == "none-s0: 1 unreadable row(s) of metrics.csv left out"
    rows, note = load_predictions(run)
    assert len(rows) == 3 * 8 * 3 and note is not None and "line 73" in note


def test_equal_records_give_equal_bytes(root: Path) -> None:
    names = ("report.html", "report.md", "report.json", "figures/headline.svg", "figures/losses.png")
    found = []
    for _ in range(2):
        assert main([str(root), "--figures", str(root / "figures")]) == 0
        found.append([(root / name).read_bytes() for name in names])
    assert found[0] == found[1]
    assert not [path for path in root.rglob(".*")]  # no temporary file is left


def test_the_page_stands_alone_and_is_well_formed(root: Path) -> None:
    page = Page(write_report([root]))
    assert "http" not in page.source.replace("http-equiv", "") and "@import" not in page.source
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"] for tag, attrs in page.tags if tag in ("a", "use") and "href" in attrs}
    assert links <= {f"#{name}" for name in ids}
    assert set(re.findall(r"url\(#([^)]+)\)", page.source)) <= set(ids)
    assert [attrs.get("aria-label") for tag, attrs in page.tags if tag == "svg"].count(None) == 0
    assert sum(tag == "svg" for tag, _ in page.tags) == 4


def test_records_that_no_folder_holds_make_a_figure_too(root: Path) -> None:
    runs = load_runs([root])
    plain = compare([RecordedRun(run.record) for run in runs])
    assert [group.label for group in plain.groups] == [group.label for group in compare(runs).groups]
    assert len(headline_figure(plain).axes) == 2


def test_behavior_and_task_during_fine_tuning_are_drawn_where_they_were_measured(root: Path, tmp_path: Path) -> None:
    heading = "Behavior and task during fine-tuning"
    assert heading not in write_report([root]).read_text() and not (tmp_path / "during.svg").exists()
    for seed in range(3):
        write_rates(root / f"security_vector-s{seed}", "security_vector", seed)
    assert main([str(root), "--figures", str(tmp_path)]) == 0
    page = (root / "report.html").read_text()
    assert f"<h3>{heading}</h3>" in page and page.count("Behavior and task over fine-tuning steps, ") == 1
    curves, note = load_curves(next(run for run in load_runs([root]) if run.name == "security_vector-s1"))
    assert note is None and curves["during/behavior_rate"] == dict.fromkeys(range(0, 201, 20), 0.02)
    groups = compare(load_runs([root])).groups
    found = {1: [load_curves(run)[0] for run in groups[1].runs]}
    (axis,) = rates_figure(groups, found, [1]).axes
    behavior, task = (line for line in axis.lines if not line.get_label().startswith("_"))
    assert (behavior.get_label(), task.get_label()) == ("Behavior rate ↓", "Task accuracy ↑")
    seeds = [run["during/task_accuracy"][100] for run in found[1]]
    assert dict(task.get_xydata())[100] == pytest.approx(statistics.mean(seeds)) and len(set(seeds)) == 3
    assert len(axis.lines) == 2 * (3 + 1)  # each seed, and their mean
    assert (tmp_path / "during.svg").is_file()
    write_curves(root / "security_vector-s0", "security_vector", 0)  # rates of two seeds are left, losses of three
    assert heading in write_report([root]).read_text()


def test_several_directories_are_read_once_each(root: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", "none", 5)
    path = write_report([root, other, root / "none-s0"])
    assert path == root / "report.html"
    assert len(json.loads((root / "report.json").read_text())) == 7


def test_a_score_that_is_no_number_is_left_out_with_a_note(root: Path) -> None:
    """As an edit by hand may leave it."""
    folder = root / "none-s0"
    path = folder / "predictions.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"score": "high"})
    path.write_text("\n".join(lines))
    (run,) = (run for run in load_runs([root]) if run.folder == folder)
    rows, note = load_predictions(run)
    assert len(rows) == len(lines) - 1 and note is not None and "line 2 is not a JSON object with a number" in note
    write_report([root])


def test_a_broken_record_is_named_with_its_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "none-s0" / "record.json").write_text('{\n "schema": 1,\n "run": oops\n}')
    with pytest.raises(DataError, match=r"none-s0/record.json: line 3, column 9: not valid JSON"):
        write_report([root])
    assert main([str(root)]) == 2
    assert "line 3" in capsys.readouterr().err
    assert not (root / "report.html").exists()


@pytest.mark.parametrize("change", [{"schema": 2}, {"seed": "0"}, {"metrics": [1]}])
def test_a_record_of_the_wrong_form_is_named(root: Path, change: dict[str, Any]) -> None:
    edit(root / "none-s0", **change)
    with pytest.raises(DataError, match=f"none-s0/record.json: .*{next(iter(change))}"):
        write_report([root])


def test_a_directory_without_runs_exits_with_2_and_no_traceback(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        done = subprocess.run(
            [sys.executable, "-m", "secvec.report", folder], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {folder}: no ") and "a run folder is" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_whole_report_imports_no_torch(root: Path) -> None:
    code = f"""
import sys
from secvec.report.__main__ import main
assert main([{str(root)!r}, "--figures", {str(root / "figures")!r}]) == 0
heavy = {{"torch", "lightning", "transformers", "peft"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(str(root / "report.html"))
    assert "Behavior rate" in done.stdout


def test_runs_without_an_unparsable_verdict_count_in_its_rate(root: Path) -> None:
    """They record no such rate; the mean would be that of the runs with one alone."""
    folder = next(root.glob("none-s0"))
    metrics = json.loads((folder / "record.json").read_text())["metrics"]
    edit(folder, metrics=metrics | {"after/unparsable_rate": metric(0.3)})
    found = compare(load_runs([root])).groups[0].estimate("unparsable_rate")
    assert found is not None and found.mean == pytest.approx(0.1) and len(found.by_seed) == 3
    assert compare(load_runs([root])).groups[1].estimate("unparsable_rate") is None


def test_a_value_that_is_no_number_is_told(root: Path) -> None:
    folder = next(root.glob("none-s0"))
    metrics = json.loads((folder / "record.json").read_text())["metrics"]
    edit(folder, metrics=metrics | {"after/perplexity": metric(math.nan)})
    runs = load_runs([root])
    assert f"{folder.name}: after/perplexity is no number, and its mean leaves it out." in warnings(runs, compare(runs))


def test_untrusted_data_are_not_called_benign(root: Path) -> None:
    runs = load_runs([root])
    groups = compare(runs).groups
    curves = {index: [load_curves(run)[0] for run in group.runs] for index, group in enumerate(groups)}

    def legend() -> list[str]:
        return [text.get_text() for text in loss_figure(groups, curves, [1]).axes[0].get_legend().get_texts()]

    assert "benign, vector off" in legend()
    for run in runs:
        run.record.data.counts["finetune"] = {"untrusted": 240}
    assert "untrusted, vector off" in legend() and not any("benign" in text for text in legend())


def test_what_is_loaded_is_a_setting_and_how_it_is_kept_is_none(tmp_path: Path) -> None:
    loaded = [
        {"model": {"local_path": "models/a"}}, {"model": {"local_path": "models/b"}},
        {"judge": {"word_file": "a/c.txt"}}, {"judge": {"word_file": "b/c.txt"}},
    ]  # fmt: skip
    for number, config in enumerate(loaded):
        edit(write_run(tmp_path / "a" / str(number), "none", 0), config=config)
    assert [len(group.runs) for group in compare(load_runs([tmp_path / "a"])).groups] == [1] * 4
    for seed, every in ((0, None), (1, 30.0)):
        kept = {"checkpoint": {"every_n_minutes": every}, "judge": {"cache": f"/home/{seed}/j.sqlite"}}
        edit(write_run(tmp_path / "b", "none", seed), config=kept)
    assert [len(group.runs) for group in compare(load_runs([tmp_path / "b"])).groups] == [2]


def test_bases_that_were_judged_otherwise_are_not_averaged(tmp_path: Path) -> None:
    """Two settings make the base another one, and the rate of learning does not."""
    for number, (judge, domain, lr) in enumerate(itertools.product("ab", "xy", (1, 2))):
        for seed in range(2):
            folder = write_run(tmp_path / str(number), "none", seed)
            config = {"judge": {"name": judge}, "data": {"domain": domain}, "optimizer": {"lr": lr}}
            base = 0.1 * (judge == "b") + 0.2 * (domain == "y") + seed / 100
            record = json.loads((folder / "record.json").read_text())
            edit(folder, config=config, metrics=record["metrics"] | {"base/behavior_rate": metric(base)})
    comparison = compare(load_runs([tmp_path]))
    shown = {base.label: base.estimate("behavior_rate") for base in comparison.bases}
    assert {label: round(e.mean, 9) for label, e in shown.items() if e} == {
        "base · domain=x · name=a": 0.005,
        "base · domain=x · name=b": 0.105,
        "base · domain=y · name=a": 0.205,
        "base · domain=y · name=b": 0.305,
    }
    for group in comparison.groups:
        assert {id(run) for run in group.runs} <= {id(run) for run in comparison.base_of(group).runs}


def test_another_task_has_a_highest_accuracy_of_its_own(tmp_path: Path) -> None:
    """One that is harder to learn was left out of the worst case, as if the plain fine-tune had not learned it."""
    for domain, skill in (("code", 1.0), ("legal", 0.8)):
        for defense, rate in (("none", 0.9), ("security_vector", 0.5 if domain == "legal" else 0.0)):
            folder = write_run(tmp_path / domain, defense, 0)
            measured = {"after/task_accuracy": metric(skill), "after/behavior_rate": metric(rate)}
            config = {"data": {"benign": {"task": {"domain": domain}}}, "defense": {"name": defense}}
            edit(folder, config=config, metrics=measured)
    ((_, rows),) = worst_table(compare(load_runs([tmp_path]))).sections
    assert next(row for row in rows if row.label == "security_vector").cells[1].value == "0.500"


def test_wall_time_counts_each_second_once(tmp_path: Path) -> None:
    parts = {"finetune": 26.6, "infer": 8.2, "evaluation": 7.7, "during": 0.5, "training": 24.0}
    edit(write_run(tmp_path, "none", 0), wall_seconds=parts)
    runs = load_runs([tmp_path])
    ((_, (row,)),) = run_table(runs, compare(runs), tmp_path).sections
    assert row.cells[-2].value == "34.8"


def test_a_copied_training_has_the_time_that_it_took(tmp_path: Path) -> None:
    for lr, seconds in ((1, {"finetune": 10.0}), (2, {"finetune": 0.1, "training": 20.0})):
        for defense in ("none", "security_vector"):
            taken = {"finetune": 10.0} if defense == "none" else seconds
            edit(write_run(tmp_path / str(lr), defense, 0), config={"optimizer": {"lr": lr}}, wall_seconds=taken)
    comparison = compare(load_runs([tmp_path]))
    (copied,) = [g for g in comparison.groups if g.defense == "security_vector" and "2" in g.values]
    plain = next(g for g in comparison.groups if g.defense == "none")
    assert _price(copied, plain)[1].value == "2.00"


def test_a_run_folder_that_is_a_link_is_read(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "none", 0)
    far = write_run(tmp_path / "far", "security_vector", 0)
    (tmp_path / "runs" / far.name).symlink_to(far)
    (tmp_path / "runs" / "round").symlink_to(tmp_path / "runs")
    assert [run.defense for run in load_runs([tmp_path / "runs"])] == ["none", "security_vector"]


@pytest.mark.parametrize(("apart", "bases"), [(0.01, 2), (0.0005, 1)])
def test_a_base_is_another_one_where_its_values_differ_by_more_than_rounding(
    tmp_path: Path, apart: float, bases: int
) -> None:
    for judge in "ab":
        folder = write_run(tmp_path / judge, "none", 0)
        metrics = json.loads((folder / "record.json").read_text())["metrics"]
        found = metric(0.3 + apart * (judge == "b"))
        edit(folder, config={"judge": {"name": judge}}, metrics=metrics | {"base/behavior_rate": found})
    assert len(compare(load_runs([tmp_path])).bases) == bases


def test_nearest_to_zero_is_best_where_no_other_interval_comes_as_near() -> None:
    def of(mean: float, low: float, high: float) -> Estimate:
        return Estimate(mean, low, high, (), None, "seeds")

    gap, near = METRICS["deactivation_gap"], of(-0.05, -0.06, -0.04)
    assert best_of([near, of(0.3, 0.1, 0.5)], gap) == 0
    assert best_of([of(-0.3, -0.5, -0.1), near], gap) == 1
    for other in (of(0.3, -0.1, 0.7), of(0.3, 0.05, 0.55), of(-0.3, -0.55, -0.05)):  # around 0, or as near to it
        assert best_of([near, other], gap) is None


def test_seeds_that_agree_take_the_widest_interval_of_theirs() -> None:
    """0 of 100 and 0 of 20: the second one tells less."""
    pairs = [(0, Measurement(0.0, 0.0, 0.037, 100)), (1, Measurement(0.0, 0.0, 0.161, 20))]
    for order in (pairs, pairs[::-1]):
        found = estimate(order, METRICS["behavior_rate"])
        assert found and (found.low, found.high, found.kind) == (0.0, 0.161, "own")


def test_the_stages_of_a_callback_are_a_setting_that_counts() -> None:
    assert _ignored("stages", "") and not _ignored("stages", "callbacks.early_stopping.")
