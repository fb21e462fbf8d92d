"""Reports over sweeps: which settings are axes, which figure they call for, the worst case, and what is cut."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import edit, metric, write_run, write_sweep

from secvec.report import write_report
from secvec.report.__main__ import main
from secvec.report.axes import MOST_PANELS, Sweep, axes, sweep, ticks
from secvec.report.drawings import protection, scatters, swept
from secvec.report.figures.heatmap import heatmap_figure
from secvec.report.figures.one_setting import bars_figure, lines_figure, points_figure
from secvec.report.figures.scatter import front
from secvec.report.groups import Comparison, compare
from secvec.report.paired import MOST, contrasts, paired_table, reading
from secvec.report.records import load_runs
from secvec.report.render import MOST_ROWS, read
from secvec.report.style import inline_svg
from secvec.report.tables import Cell, Row, Table
from secvec.report.terminal import show
from secvec.report.worst import MANY, focus, worst, worst_table

LRS, COUNTS, RANKS = [1e-4, 1e-3, 1e-2], [100, 1000], [1, 8]


def comparison(root: Path, settings: dict[str, Any], **given: Any) -> Comparison:
    write_sweep(root, settings, **given)
    return compare(load_runs([root]))


def swept_of(root: Path, settings: dict[str, Any], **given: Any) -> Sweep:
    found = sweep(comparison(root, settings, **given))
    assert found is not None
    return found


def test_a_defense_has_one_color_in_all_figures(tmp_path: Path) -> None:
    """The first panel may lack `none`: the order of the defenses is that of the whole comparison all the same."""
    for defense, schedules in (("none", ["linear"]), ("security_vector", ["constant", "linear"])):
        write_sweep(tmp_path, {"optimizer.lr": [1e-3, 1e-2], "scheduler.name": schedules}, [defense])
    found = compare(load_runs([tmp_path]))
    drawn = sweep(found)
    assert drawn is not None and len(drawn.facets) == 2
    assert {group.defense for group in drawn.facets[0].groups} == {"security_vector"}
    assert drawn.defenses == found.defenses == ["none", "security_vector"]


def test_axes_are_what_varies_with_numbers_in_order(tmp_path: Path) -> None:
    given = {
        "optimizer.lr": [1e-2, 1e-4, 2e-3],
        "data.num_harmful": [1000, 200],
        "scheduler.name": ["linear", "cosine"],
    }
    found = axes(comparison(tmp_path, given, seeds=2))
    assert {axis.key: [axis.text(v) for v in axis.values] for axis in found} == {
        "optimizer.lr": ["0.0001", "0.002", "0.01"], "data.num_harmful": ["200", "1000"],
        "scheduler.name": ["cosine", "linear"],
    }  # fmt: skip
    assert {axis.key: (axis.numeric, axis.log) for axis in found} == {
        "optimizer.lr": (True, True), "data.num_harmful": (True, False), "scheduler.name": (False, False),
    }  # fmt: skip


def test_settings_that_vary_together_are_one_axis_the_one_that_was_asked_for(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"vector.r": [1, 8]})
    for folder in tmp_path.iterdir():
        record = json.loads((folder / "record.json").read_text())
        record["config"]["alpha"] = 2 * record["config"]["vector"]["r"]  # shorter, and the first by name
        edit(folder, config=record["config"])
    assert compare(load_runs([tmp_path])).keys == ("vector.r",)


def test_choosing_a_node_makes_its_name_the_axis(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"scheduler.name": ["cosine", "constant"]})
    for folder in tmp_path.iterdir():
        config = json.loads((folder / "record.json").read_text())["config"]
        config["scheduler"]["cycle"] = config["scheduler"]["name"] == "cosine"
        edit(folder, config=config, overrides=[f"scheduler={config['scheduler']['name']}"])
    assert compare(load_runs([tmp_path])).keys == ("scheduler.name",)


def test_choosing_a_node_for_another_place_makes_its_name_the_axis(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"vector.behavior.name": ["wrong_fact", "uppercase"]})
    for folder in tmp_path.iterdir():
        config = json.loads((folder / "record.json").read_text())["config"]
        config["vector"]["behavior"]["about"] = config["vector"]["behavior"]["name"][0]  # the first by name
        edit(folder, config=config, overrides=[f"behavior@vector.behavior={config['vector']['behavior']['name']}"])
    assert compare(load_runs([tmp_path])).keys == ("vector.behavior.name",)


def test_the_seed_of_the_base_is_a_setting(tmp_path: Path) -> None:
    for seed in range(3):
        folder = write_run(tmp_path / str(seed), "security_vector", 0)
        edit(folder, config={"seed": 0, "model": {"align": {"seed": seed}}})
    found = compare(load_runs([tmp_path]))
    assert found.keys == ("model.align.seed",) and len(found.groups) == 3


def test_a_vector_taken_over_is_a_setting_but_not_its_seed(tmp_path: Path) -> None:
    for behavior in ("uppercase", "wrong_fact"):
        for seed in range(2):
            path = f"outputs/security_vector-{behavior}-tiny-s{seed}-0123abcd/vector"
            folder = write_run(tmp_path / behavior, "security_vector", seed)
            edit(folder, config={"defense": {"name": "security_vector"}, "vector": {"path": path}})
    found = compare(load_runs([tmp_path]))
    assert found.keys == ("vector.path",) and [len(group.runs) for group in found.groups] == [2, 2]
    (axis,) = axes(found)
    assert [axis.text(value) for value in axis.values] == ["…uppercase-tiny", "…wrong_fact-tiny"]


def test_vectors_of_one_seed_are_told_apart(tmp_path: Path) -> None:
    """Their runs' names hold no settings; without their keys, two ranks would be one column."""
    for key in ("0123abcd", "89efcdab"):
        for seed in range(2):
            path = f"outputs/security_vector-x-tiny-s{seed}-{key[seed:]}{key[:seed]}/vector"
            edit(write_run(tmp_path / key, "security_vector", seed), config={"vector": {"path": path}})
    assert [len(group.runs) for group in compare(load_runs([tmp_path])).groups] == [1, 1, 1, 1]
    shutil.rmtree(tmp_path / "0123abcd")
    assert [len(group.runs) for group in compare(load_runs([tmp_path])).groups] == [2]


@pytest.mark.parametrize(
    ("key", "names", "shown"),
    [
        ("data.file", ("/d/legal/train.jsonl", "/d/medical/train.jsonl"), ("legal/train.jsonl", "medical/train.jsonl")),
        ("data.benign.chat.path", ("tatsu-lab/alpaca", "yahma/alpaca"), ("tatsu-lab/alpaca", "yahma/alpaca")),
        ("behavior.data_dir", ("harmless-base", "red-team-attempts"), ("harmless-base", "red-team-attempts")),
        ("data.file", ("a.jsonl", "sub/a.jsonl"), ("a.jsonl", "sub/a.jsonl")),
    ],
)
def test_other_rows_are_another_column(
    tmp_path: Path, key: str, names: tuple[str, str], shown: tuple[str, str]
) -> None:
    for number, name in enumerate(names):
        value: Any = name
        for part in reversed(key.split(".")):
            value = {part: value}
        for seed in range(2):
            folder = write_run(tmp_path / str(number), "none", seed)
            edit(folder, config=value, data={"sha256": {"finetune": f"{number}{seed}"}, "counts": {}})
    found = compare(load_runs([tmp_path]))
    assert [json.loads(group.values[0]) for group in found.groups] == list(shown)


def test_the_same_rows_may_lie_elsewhere(tmp_path: Path) -> None:
    for place in ("here", "there"):
        folder = write_run(tmp_path / place, "none", 0)
        edit(folder, config={"data": {"file": f"/{place}/mine.jsonl"}}, data={"sha256": {"finetune": "ff"}})
    assert len(compare(load_runs([tmp_path])).groups) == 1


def test_the_floor_is_that_of_the_same_settings(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"data.num_harmful": [10, 1000]})
    for folder in tmp_path.glob("none-*"):
        record = json.loads((folder / "record.json").read_text())
        loss = 2.0 if record["config"]["data"]["num_harmful"] == 10 else 0.05
        edit(folder, metrics=record["metrics"] | {"after/behavior_loss": metric(loss)})
    found = compare(load_runs([tmp_path]))
    floors = {group.label: floor.mean for group in found.groups if (floor := found.floor(group))}
    assert floors["security_vector · num_harmful=10"] == 2.0 and floors["security_vector · num_harmful=1000"] == 0.05


def test_whole_numbers_are_written_whole(tmp_path: Path) -> None:
    given = {"vector.kl_weight": [0.1, 100.0], "behavior.severity": [[0.0, 1.5], [1.0, 3.0]]}
    labels = [group.label for group in comparison(tmp_path, given, defenses=["none"]).groups]
    assert labels[0] == "none · severity=[0, 1.5] · kl_weight=0.1"
    assert labels[-1] == "none · severity=[1, 3] · kl_weight=100"


def test_a_setting_in_a_list_is_named_as_on_the_command_line(tmp_path: Path) -> None:
    streams = [[{"domain": domain, "kind": "task"}, {"kind": "ordinary"}] for domain in ("legal", "code")]
    found = comparison(tmp_path, {"data.benign": streams}, defenses=["none"])
    assert found.keys == ("data.benign.0.domain",)
    assert [group.label for group in found.groups] == ["none · domain=code", "none · domain=legal"]


def test_a_defense_that_uses_no_vector_has_no_settings_of_it(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"vector.r": RANKS}, defenses=["none", "security_vector"])
    (plain,) = tmp_path.glob("none-0-*")
    assert len(compare(load_runs([tmp_path])).groups) == 4
    edit(plain, config={"defense": {"name": "none", "uses_vector": False}, "vector": {"r": RANKS[0]}})
    shutil.rmtree(next(tmp_path.glob("none-1-*")))  # it is the same run
    found = compare(load_runs([tmp_path]))
    assert [group.label for group in found.groups] == ["none", "security_vector · r=1", "security_vector · r=8"]
    (axis,) = axes(found)
    assert axis.key == "vector.r" and [axis.text(value) for value in axis.values] == ["1", "8"]


def test_without_a_varying_setting_there_is_no_sweep(tmp_path: Path) -> None:
    assert sweep(comparison(tmp_path, {"optimizer.lr": [0.1]}, seeds=3)) is None


@pytest.mark.parametrize(
    ("settings", "kind", "over", "titles"),
    [
        ({"optimizer.lr": LRS}, "lines", ["optimizer.lr"], [""]),
        ({"scheduler.name": ["a", "b"]}, "bars", ["scheduler.name"], [""]),
        ({"optimizer.lr": LRS, "data.num_harmful": COUNTS}, "heatmap", ["optimizer.lr", "data.num_harmful"], [""]),
        ({"judge.name": ["a", "b"], "scheduler.name": ["x", "y", "z"]}, "heatmap", ["scheduler.name", "judge.name"],
         [""]),
        ({"optimizer.lr": LRS, "scheduler.name": ["a", "b"]}, "lines", ["optimizer.lr"],
         ["scheduler.name = a", "scheduler.name = b"]),
        ({"vector.r": RANKS, "optimizer.lr": LRS, "data.num_harmful": [1, 2, 3, 4]}, "heatmap",
         ["data.num_harmful", "optimizer.lr"], ["vector.r = 1", "vector.r = 8"]),
    ],
)  # fmt: skip
def test_the_kind_of_figure_follows_the_axes(
    tmp_path: Path, settings: dict[str, Any], kind: str, over: list[str], titles: list[str]
) -> None:
    found = swept_of(tmp_path, settings)
    assert (found.kind, [axis.key for axis in found.axes], [f.title for f in found.facets]) == (kind, over, titles)
    # Every configuration stands in one place of one panel: there is nothing to average.
    places = [(f.title, g.defense, *(found.value(g, a) for a in found.axes)) for f in found.facets for g in f.groups]
    assert len(places) == len(set(places)) == 2 * len(list(tmp_path.glob("none-*")))


def test_lines_pass_through_the_means_with_bands_of_the_intervals(tmp_path: Path) -> None:
    found = swept_of(tmp_path, {"optimizer.lr": LRS}, seeds=3)
    (panel,) = lines_figure(found, found.facets, "behavior_rate").axes
    assert panel.get_xscale() == "log"
    drawn = {line.get_label(): line for line in panel.get_lines() if not str(line.get_label()).startswith("_")}
    assert list(drawn) == ["none", "security_vector"]
    assert list(drawn["security_vector"].get_xdata()) == LRS
    assert list(drawn["security_vector"].get_ydata()) == pytest.approx([0.001, 0.011, 0.021])
    group = found.facets[0].groups[0]
    interval = group.estimate("behavior_rate")
    band = panel.collections[0].get_paths()[0].get_extents()
    assert interval and (band.y0, band.y1) == pytest.approx((interval.low, interval.high))


def test_texts_of_ticks_do_not_meet(tmp_path: Path) -> None:
    found = swept_of(tmp_path, {"data.harmful_ratio": [0.01, 0.1, 0.5, 0.9, 1.0]})
    assert ticks(found.axes[0])[1] == ["0.01", "0.1", "0.5", "1"]
    many = swept_of(tmp_path / "many", {"vector.r": list(range(1, 31))})
    assert 10 <= len(ticks(many.axes[0])[0]) <= 15 and ticks(many.axes[0])[1][-1] == "30"


def test_a_defense_with_one_configuration_is_a_level_line_that_says_so(tmp_path: Path) -> None:
    write_sweep(tmp_path / "a", {"optimizer.lr": [1e-3]}, ["none"])
    found = swept_of(tmp_path, {"optimizer.lr": LRS}, defenses=["security_vector"])
    figure = lines_figure(found, found.facets, "behavior_rate")
    labels = [str(line.get_label()) for line in figure.axes[0].get_lines()]
    assert "none (only at 0.001)" in labels and "none" not in labels


def test_heat_maps_print_values_hatch_what_is_missing_and_outline_the_worst(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"optimizer.lr": LRS, "data.num_harmful": COUNTS})
    (missing,) = [f for f in tmp_path.iterdir() if f.name == "security_vector-0-s0"]
    (missing / "record.json").unlink()
    found = sweep(compare(load_runs([tmp_path])))
    assert found is not None
    figure = heatmap_figure(found, found.facets, "behavior_rate", found.defenses)
    none, protected = figure.axes
    assert none.get_xlim() == protected.get_xlim()
    assert [text.get_text() for text in protected.texts] == ["0.02", "0.04", "0.01", "0.03", "0.05"]
    assert [sum(bool(p.get_hatch()) for p in panel.patches) for panel in (none, protected)] == [0, 1]
    outlined = [p for p in protected.patches if p.get_width() == 0.88]
    assert [(p.get_x() + 0.44, p.get_y() + 0.44) for p in outlined] == [(2, 1)]  # the last configuration
    alone = heatmap_figure(found, found.facets, "behavior_rate", ["none"]).axes[0]
    deep, same, pale = (panel.patches[1].get_facecolor() for panel in (none, alone, protected))
    assert deep == same  # one scale, whatever else is drawn
    assert sum(deep[:3]) < sum(pale[:3])


def test_a_large_heat_map_is_one_surface_with_the_worst_outlined(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"vector.r": list(range(1, 17)), "data.num_harmful": list(range(1, 17))}, ["x"])
    (tmp_path / "x-0-s0" / "record.json").unlink()
    found = sweep(compare(load_runs([tmp_path])))
    assert found is not None
    (panel,) = heatmap_figure(found, found.facets, "behavior_rate", ["x"]).axes
    (surface,) = panel.collections
    shades = surface.get_array()
    assert shades is not None and shades.shape == (16, 16) and int(shades.mask.sum()) == 1 and shades.mask[0, 0]
    assert len(panel.patches) == 2 and not panel.texts  # the hatched ground and the outline
    svg = inline_svg(heatmap_figure(found, found.facets, "behavior_rate", ["x"]), "f", "told")
    assert svg.count("<title>") == 0


def test_bars_are_grouped_by_category(tmp_path: Path) -> None:
    found = swept_of(tmp_path, {"scheduler.name": ["linear", "cosine"]})
    (panel,) = bars_figure(found, found.facets, "behavior_rate").axes
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["cosine", "linear"]
    assert [bar.get_width() for bar in panel.patches] == pytest.approx([0.9, 0.9, 0.01, 0.0])
    assert [text.get_text() for text in panel.texts].count("0.01 worst") == 1


def test_only_so_many_panels_are_in_the_page_and_it_says_so(tmp_path: Path) -> None:
    found = swept_of(tmp_path, {"optimizer.lr": LRS, "data.num_harmful": [1, 2, 3], "vector.r": [1, 2],
                                "tune.kind": ["a", "b", "c", "d"]}, defenses=["none"])  # fmt: skip
    assert len(found.facets) == 8 > MOST_PANELS
    assert f"first {MOST_PANELS} of 8 panels" in found.reading and "none is averaged over" in found.reading
    whole = list(swept(found, whole=True))
    assert len(list(swept(found, whole=False))) == 3 * MOST_PANELS and len(whole) == 3 * 2
    assert [len(one.draw().axes) for one in whole[:2]] == [MOST_PANELS, 8 - MOST_PANELS]


def test_the_front_is_what_none_beats() -> None:
    points = [(0.5, 0.9), (0.1, 0.5), (0.2, 0.4), (0.1, 0.6), (0.9, 0.95), (0.6, 0.9)]
    assert front(points) == [3, 0, 4]
    assert front([]) == []


def test_behaviors_do_not_compete_in_one_scatter(tmp_path: Path) -> None:
    for behavior in ("a", "b"):
        write_sweep(tmp_path / behavior, {"optimizer.lr": LRS})
        for folder in (tmp_path / behavior).iterdir():
            edit(folder, behavior=behavior)
    made = scatters(compare(load_runs([tmp_path])))
    assert [one.about for one in made] == ["Safety and utility · behavior=a", "Safety and utility · behavior=b"]
    assert len(made[0].draw().axes[0].get_lines()) > 6


def with_vector(root: Path, places: dict[str, float], phase: str) -> None:
    """Gives every run with a vector the `places` metric by the learning rate it was trained with."""
    for folder in root.glob("security_vector-*"):
        record = json.loads((folder / "record.json").read_text())
        for name, scale in places.items():
            value = scale * record["config"]["optimizer"]["lr"]
            record["metrics"][f"{phase}/{name}"] = {"value": value, "ci_low": value, "ci_high": value, "n": 100}
        edit(folder, metrics=record["metrics"])


def test_protection_is_drawn_over_the_loss_of_the_vector(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"optimizer.lr": LRS})
    assert protection(compare(load_runs([tmp_path]))) == []
    with_vector(tmp_path, {"behavior_loss": 100.0}, "vector_on")
    (drawn,) = protection(compare(load_runs([tmp_path])))
    assert drawn.name == "protection-behavior_loss"
    (panel,) = drawn.draw().axes
    x, y = (list(map(float, line)) for line in panel.get_lines()[0].get_data())
    assert x == pytest.approx([0.01, 0.1, 1.0]) and y == pytest.approx([0.0, 0.01, 0.02])
    assert panel.get_xscale() == "log" and "mathdefault" not in inline_svg(drawn.draw(), "f", "told")
    assert "What got through" in write_report([tmp_path]).read_text()


def test_staleness_is_a_line_of_its_own_and_no_rate(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"optimizer.lr": LRS})
    with_vector(tmp_path, {"behavior_loss": 300.0}, "active")
    found = sweep(compare(load_runs([tmp_path])))
    *_, last = swept(found, whole=True)
    assert last.name == "sweep-behavior_loss-vector_on"
    (panel,) = last.draw().axes
    (line,) = [line for line in panel.get_lines() if line.get_label() == "security_vector"]  # none has no vector
    assert list(line.get_ydata()) == pytest.approx([0.03, 0.3, 3.0]) and panel.get_ylim()[1] > 3


def test_what_a_search_leaves_is_points_and_not_an_empty_heat_map(tmp_path: Path) -> None:
    for number in range(6):
        write_sweep(
            tmp_path / str(number), {"optimizer.lr": [10.0 ** -(number + 1)], "finetune.epochs": [number % 3 + 1]}
        )
    found = sweep(compare(load_runs([tmp_path])))
    assert found is not None and (found.kind, found.axes[0].key) == ("points", "optimizer.lr")
    assert [axis.key for axis in found.beside] == ["finetune.epochs"] and len(found.facets) == 1
    (panel,) = points_figure(found, found.facets, "behavior_rate").axes
    assert [text.get_text() for text in panel.texts].count("3") == 4  # two trials of both defenses
    assert "Too few combinations" in write_report([tmp_path]).read_text()


def test_titles_to_hover_over_name_the_configuration(tmp_path: Path) -> None:
    found = swept_of(tmp_path, {"optimizer.lr": LRS})
    svg = inline_svg(lines_figure(found, found.facets, "behavior_rate"), "f", "told")
    assert "<title>security_vector · lr=0.01: behavior rate 0.020 [" in svg and "title-" not in svg
    assert svg.count("worst case in this panel") == 2


def test_the_worst_case_has_the_highest_behavior_and_of_several_the_lowest_skill(tmp_path: Path) -> None:
    found = comparison(tmp_path, {"optimizer.lr": LRS})
    chosen = worst(group for group in found.groups if group.defense == "none")
    assert chosen is not None and chosen.label == "none · lr=0.01"  # all have 0.9; the last the lowest accuracy
    (_, rows), *_ = worst_table(found).sections
    assert [(row.label, row.cells[0].value, row.cells[1].value, row.cells[2].value) for row in rows] == [
        ("security_vector", "lr=0.01", "0.020", "0.798"), ("none", "lr=0.01", "0.900", "0.798"),
    ]  # fmt: skip
    assert (rows[0].cells[-1].value, rows[0].cells[-1].count) == ("0.000 to 0.020", "3 configurations")
    assert not worst_table(comparison(tmp_path / "one", {"optimizer.lr": [0.1]})).sections


def test_the_worst_case_is_where_the_plain_fine_tune_still_learns_the_task(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"optimizer.lr": LRS})
    for folder in tmp_path.iterdir():
        record = json.loads((folder / "record.json").read_text())
        if record["defense"] == "none" and record["config"]["optimizer"]["lr"] == LRS[-1]:
            record["metrics"]["after/task_accuracy"]["value"] = 0.1
            edit(folder, metrics=record["metrics"])
    table = worst_table(compare(load_runs([tmp_path])))
    (_, rows), *_ = table.sections
    assert [(row.label, row.cells[0].value) for row in rows] == [("security_vector", "lr=0.001"), ("none", "lr=0.001")]
    assert rows[0].cells[-1].count == "2 configurations" and "2 of 6 configurations" in table.left_out


def test_the_price_of_a_defense_stands_beside_its_result(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"optimizer.lr": LRS}, seeds=3)
    for number, folder in enumerate(sorted(tmp_path.iterdir())):
        record = json.loads((folder / "record.json").read_text())
        plain = record["defense"] == "none"
        needs = [] if plain else ["undesired samples", "safe samples"]
        seconds = {"finetune": 10.0 if plain else 13.0 + number % 2 / 100}
        edit(
            folder, needs=needs, wall_seconds=seconds, peak_bytes={"host": 2e9, "gpu": 1e9} if plain else {"host": 3e9}
        )
    table = worst_table(compare(load_runs([tmp_path])))
    (_, (defended, plain)), *_ = table.sections
    assert table.columns[-3:] == ["Needs", "Time ÷ plain", "Memory"]
    assert [cell.text for cell in defended.cells[-3:]] == ["undesired samples, safe samples", "1.30", "3.0 GB"]
    assert [cell.text for cell in plain.cells[-3:]] == ["–", "1.00", "1.0 GB"]


def test_what_does_not_fit_side_by_side_is_the_worst_case_of_each_defense(tmp_path: Path) -> None:
    few = comparison(tmp_path / "few", {"optimizer.lr": [0.1 * i for i in range(1, MANY // 2 + 1)]})
    assert focus(few) is few
    many = focus(comparison(tmp_path / "many", {"vector.r": list(range(MANY))}))
    assert [group.label for group in many.groups] == [f"none · r={MANY - 1}", f"security_vector · r={MANY - 1}"]


def test_a_large_sweep_is_cut_in_the_page_and_whole_in_the_files(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"optimizer.lr": LRS, "vector.r": list(range(30))}, seeds=2)
    page = write_report([tmp_path]).read_text()
    main_table = page[page.index('<table class="results many"') :]
    main_table = main_table[: main_table.index("</table>")]
    assert main_table.count("<tr>") == 1 + MOST_ROWS and f"The first {MOST_ROWS} of 181 rows." in page
    assert "There are 180 configurations." in page
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 360 == len(json.loads((tmp_path / "report.json").read_text()))
    assert {(row["optimizer.lr"], row["vector.r"]) for row in rows} == {
        (str(a), str(b)) for a in LRS for b in range(30)
    }
    row = next(row for row in rows if row["folder"] == "security_vector-7-s1")
    assert (row["after/behavior_rate"], row["after/behavior_rate n"], row["seed"]) == (
        "0.07100000000000001",
        "100",
        "1",
    )
    assert float(row["after/behavior_rate low"]) < 0.071 < float(row["after/behavior_rate high"])


def test_of_many_contrasts_as_many_of_every_defense_are_tested(tmp_path: Path) -> None:
    defenses = ["none", "x", "y"]
    found = comparison(tmp_path, {"vector.r": list(range(MOST))}, defenses=defenses)
    answers = [{"phase": "after", "stream": "undesired", "id": "1", "prompt": "?", "verdict": "behavior"}]
    for folder in tmp_path.iterdir():
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    assert len(list(contrasts(found))) == 2 * MOST
    sections = [title for title, _ in paired_table(found).sections]
    assert len(sections) == MOST and sum(title.startswith("x ") for title in sections) == MOST // 2
    assert f"first {MOST} of {2 * MOST}" in reading(found)


def test_every_figure_and_table_is_written_and_none_of_an_earlier_report_stays(tmp_path: Path) -> None:
    write_sweep(tmp_path / "runs", {"optimizer.lr": LRS, "data.num_harmful": COUNTS})
    out, tab = tmp_path / "figures", tmp_path / "tables"
    (out).mkdir()
    (out / "sweep-old.svg").write_text("")
    (out / "mine.svg").write_text("")
    assert main([str(tmp_path / "runs"), "--figures", str(out), "--tables", str(tab)]) == 0
    names = {"headline", "sweep-behavior_rate", "sweep-task_accuracy", "sweep-refusal_rate", "pareto"}
    assert {p.name for p in out.iterdir()} == {f"{n}.{s}" for n in names for s in ("svg", "png")} | {"mine.svg"}
    tables = ("results", "worst", "runs")  # no answers, no probes, no loss: nothing in the other three
    assert {p.name for p in tab.iterdir()} == {f"{n}.{s}" for n in tables for s in ("csv", "tex", "md")}
    with (tab / "results.csv").open(newline="") as file:
        cells = {(r["row"], r["column"]): r for r in csv.DictReader(file)}
    one = cells["security_vector · num_harmful=1000 · lr=0.01", "Behavior rate ↓"]
    assert one["value"] == "0.050" and float(one["low"]) < 0.05 < float(one["high"]) and one["count"] == "1 × 100"


def test_latex_is_escaped_and_has_one_ampersand_less_than_columns() -> None:
    from secvec.report.exports import latex

    cells = [Cell("0.5", "[0.4, 0.6]", "3 × 100", own=True, best=True), Cell("–")]
    table = Table(["a_b", "50 %"], [("A & B", [Row("x^2", cells, "↓")])], "50 % of #1", "Metric")
    text = latex(table)
    assert r"\caption{50 \% of \#1}" in text and r"a\_b & 50 \% \\" in text
    assert r"x\textasciicircum{}2 $\downarrow$ & \textbf{0.5 [0.4, 0.6]$^\dagger$ (3 $\times$ 100)} & -- \\" in text
    assert r"\textit{A \& B}" in text and "interval over prompts" in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    assert re.search(r"(?<!\\)[%#]", text.split("\n", 1)[1]) is None


def test_a_table_is_turned_and_cut() -> None:
    data = Table(["a", "b"], [("S", [Row("x", [Cell("1"), Cell("2")], "↓"), Row("y", [Cell("3"), Cell("4")])])])
    turned = data.turned()
    assert turned.columns == ["S: x ↓", "S: y"]
    ((_, rows),) = turned.sections
    assert [(row.label, [c.value for c in row.cells]) for row in rows] == [("a", ["1", "3"]), ("b", ["2", "4"])]
    cut = data.capped(1)
    assert [len(rows) for _, rows in cut.sections] == [1] and cut.left_out == "The first 1 of 2 rows."
    assert data.capped(2) is data


def test_the_terminal_shows_no_cut_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Columns beside each other where they fit, else a line for each configuration."""
    write_sweep(tmp_path, {"optimizer.lr": LRS})
    for width, corner in (("80", "Configuration"), ("250", "Metric")):
        monkeypatch.setenv("COLUMNS", width)
        show(read([tmp_path]))
        shown = capsys.readouterr().out
        assert corner in shown and "0.900" in shown and "…" not in shown
        assert max(map(len, shown.splitlines())) <= int(width)


@pytest.mark.parametrize(("share", "kept"), [(0.88, 2), (0.92, 3)])
def test_nine_tenths_of_the_highest_accuracy_is_learning_the_task(tmp_path: Path, share: float, kept: int) -> None:
    write_sweep(tmp_path, {"optimizer.lr": LRS})
    plain = []
    for folder in tmp_path.iterdir():
        record = json.loads((folder / "record.json").read_text())
        if record["defense"] == "none":
            plain.append(record)
            low = record["config"]["optimizer"]["lr"] == LRS[-1]
            record["metrics"]["after/task_accuracy"]["value"] = 0.8 * share if low else 0.8
            edit(folder, metrics=record["metrics"])
    (_, rows), *_ = worst_table(compare(load_runs([tmp_path]))).sections
    assert {row.label: row.cells[-1].count or row.cells[-4].count for row in rows} == dict.fromkeys(
        ("none", "security_vector"), f"{kept} configurations"
    )
