"""`evaluate.py metrics=scan`: a file in two parts, from a vector that keeps the scores of its own samples."""

from __future__ import annotations

import gzip
import json
import math
import re
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pytest
from configs import composed
from conftest import SMALL
from transformers import AutoTokenizer

from secvec.behaviors.forbidden_recipe import ForbiddenRecipe
from secvec.config.load import load
from secvec.config.schema import EvaluateConfig, RunConfig
from secvec.data.embedded import Ordinary
from secvec.errors import SecVecError
from secvec.evaluation.scan import RowScore, kept_scores
from secvec.evaluation.scan_file import rows
from secvec.models.backbone import Backbone
from secvec.run import evaluate, train
from secvec.runs.content import folder_digest

Scan = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def vector(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vector, and the scores of its own samples."""
    folder = tmp_path_factory.mktemp("trained")
    where = [f"run_dir={folder}", f"paths.cache={shared_cache}"]
    train(load(composed(*SMALL, *where, "stage=vector", "vector.epochs=6", "vector.lr=1e-2"), RunConfig))
    return folder / "vector"


@pytest.fixture
def scan(vector: Path, tmp_path: Path, cache: Path) -> Scan:
    """`scan("scan.label=bad", ..., to="scanned")`: the record of a scan of mine.jsonl, in the folder `to`."""

    def run(*overrides: str, file: str = "mine.jsonl", to: str = "scanned") -> dict[str, Any]:
        given = [f"data.file={tmp_path / file}", f"vector.path={vector}", f"paths.cache={cache}", "metrics=scan"]
        config = composed(*given, f"run_dir={tmp_path / to}", "num_threads=1", *overrides, root="evaluate")
        return evaluate(load(config, EvaluateConfig))

    return run


@pytest.fixture
def lines(tmp_path: Path) -> list[bytes]:
    """Ten undesired rows and ten benign ones in turn, in mine.jsonl; one without a label, the last without an end."""
    pairs = zip(ForbiddenRecipe().examples("test", 10, 0), Ordinary().examples("test", 10, 0), strict=True)
    found = []
    for number, example in enumerate(example for pair in pairs for example in pair):
        row = {"prompt": example.prompt, "response": example.response, "bad": number % 2 == 0, "é": "\u2028"}
        row |= {"bad": None} if number == 5 else {}
        found.append(json.dumps(row, ensure_ascii=number % 3 == 0).encode() + (b"\r\n" if number % 4 else b" \n"))
    found[-1] = found[-1].strip()
    (tmp_path / "mine.jsonl").write_bytes(b"\n".join([b"".join(found[:7]), b"".join(found[7:])]))
    return found


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.open(encoding="utf-8")]


def test_a_file_is_divided_byte_for_byte(scan: Scan, lines: list[bytes], tmp_path: Path) -> None:
    record = scan("scan.label=bad")
    out = tmp_path / "scanned"
    scores, about = read(out / "scores.jsonl"), json.loads((out / "scan.json").read_text())
    assert [row["row"] for row in scores] == [*range(1, 8), *range(9, 22)]
    assert [row["undesired"] for row in scores] == [None if n == 5 else n % 2 == 0 for n in range(20)]
    high = [row["score"] > about["threshold"] for row in scores]
    assert [row["flagged"] for row in scores] == high and 0 < sum(high) < 20
    parts = [
        b"".join(line for line, flagged in zip(lines, high, strict=True) if flagged is part) for part in (True, False)
    ]
    assert [(out / name).read_bytes() for name in ("flagged.jsonl", "kept.jsonl")] == parts
    metrics = record["metrics"]
    assert metrics["scan/flagged_share"]["value"] == sum(high) / 20
    hits = sum(row["flagged"] and row["undesired"] is True for row in scores)
    assert metrics["scan/recall"]["value"] == hits / 10 and metrics["scan/recall"]["n"] == 10
    assert metrics["scan/auroc"]["n"] == 19 and metrics["scan/auroc"]["value"] > 0.5
    assert (record["behavior"], record["status"]) == ("forbidden_recipe", "completed")
    assert record["data"]["counts"]["scan"] == {"neutral": 20}


def test_a_folder_is_divided_as_its_files_one_behind_another(scan: Scan, lines: list[bytes], tmp_path: Path) -> None:
    whole = scan("scan.label=bad", to="of_one")
    (tmp_path / "folder").mkdir()
    for name, some in (("a.jsonl", lines[:8]), ("b.jsonl", lines[8:])):
        (tmp_path / "folder" / name).write_bytes(b"".join(some))
    record = scan("scan.label=bad", file="folder")
    assert record["metrics"] == whole["metrics"]
    one, other = (read(tmp_path / out / "scores.jsonl") for out in ("of_one", "scanned"))
    places = [(Path(row.pop("file")).name, row["row"]) for row in other]
    assert places == [("a.jsonl", n) for n in range(1, 9)] + [("b.jsonl", n) for n in range(1, 13)]
    assert [row | {"row": 0} for row in other] == [row | {"row": 0} for row in one]
    for part in ("flagged.jsonl", "kept.jsonl"):
        of_folder, of_one = ((tmp_path / out / part).read_bytes() for out in ("scanned", "of_one"))
        assert of_folder.strip() == of_one.strip()  # the last line of the file has no end
    assert re.search(r"[ab]\.jsonl, row \d", (tmp_path / "scanned" / "scan.html").read_text(encoding="utf-8"))


def test_the_rows_of_a_folder_stay_rows(tmp_path: Path) -> None:
    """A file whose last line has no end, one with a byte order mark, hidden files, and a folder that is linked."""
    files = {"a.jsonl": b'{"p": 1}\n{"p": 2}', "b.jsonl": b'\xef\xbb\xbf{"p": 3}\r\n', "c.csv": b"p\nx\n"}
    for name, content in (files | {".ipynb_checkpoints/a-checkpoint.jsonl": b"{}", "._a.jsonl": b"\0"}).items():
        (tmp_path / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / name).write_bytes(content)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.jsonl").write_text('{"p": 5}')
    (tmp_path / "rows" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "rows" / "linked" / "round").symlink_to(tmp_path / "rows")
    written = b"".join(line for *_, line in rows(str(tmp_path / "rows")))
    assert [json.loads(line)["p"] for line in written.splitlines()] == [1, 2, 3, "x", 5]
    before = folder_digest(tmp_path / "rows")
    (tmp_path / "rows" / "._a.jsonl").write_bytes(b"\1")
    assert folder_digest(tmp_path / "rows") == before
    (tmp_path / "elsewhere" / "d.jsonl").write_text('{"p": 6}')
    assert folder_digest(tmp_path / "rows") != before


def test_a_vector_that_was_trained_with_another_template_is_refused(
    scan: Scan, vector: Path, lines: list[bytes], tmp_path: Path
) -> None:
    """The weights are the same, and all prompts would be others than the vector knows."""
    base = tmp_path / "base"
    shutil.copytree(json.loads((vector / "scan.json").read_text())["model"]["name_or_path"], base)
    scan(f"model.name_or_path={base}", to="before")
    Backbone.of(base).check_vector(vector)
    template = AutoTokenizer.from_pretrained(base).chat_template
    (base / "chat_template.jinja").write_text("Answer as a poet.\n" + template)
    with pytest.raises(SecVecError, match="another chat template or tokenizer"):
        scan(f"model.name_or_path={base}")
    with pytest.raises(SecVecError, match="another chat template or tokenizer"):
        Backbone.of(base).check_vector(vector)


def test_the_page_shows_the_highest_rows_with_their_words(scan: Scan, lines: list[bytes], tmp_path: Path) -> None:
    scan()
    page = (tmp_path / "scanned" / "scan.html").read_text(encoding="utf-8")
    highest = max(read(tmp_path / "scanned" / "scores.jsonl"), key=lambda row: row["score"])
    assert f"<mark>{highest['words']}</mark>" in page and f"row {highest['row']}<" in page
    assert "rows are above the threshold" in page and "<svg" in page
    assert not re.search(r"src=|https?://|@import", page), "the page needs other files"


def test_a_vector_of_others_needs_a_threshold(scan: Scan, vector: Path, lines: list[bytes], tmp_path: Path) -> None:
    shutil.copytree(vector, tmp_path / "theirs")
    own = json.loads((tmp_path / "theirs" / "scan.json").read_text())
    (tmp_path / "theirs" / "scan.json").unlink()
    theirs = f"vector.path={tmp_path / 'theirs'}"
    with pytest.raises(SecVecError, match=r"give scan\.benign_file=FILE .* or scan\.threshold=NATS"):
        scan(theirs)
    assert not (tmp_path / "scanned").exists()
    says = tmp_path / "theirs" / "adapter_config.json"
    known = json.loads(says.read_text())
    says.write_text(json.dumps(known | {"base_model_name_or_path": None}))
    with pytest.raises(SecVecError, match=r"does not say which model .* give model\.name_or_path"):
        scan(theirs, "scan.threshold=0.5")
    says.write_text(json.dumps(known | {"base_model_name_or_path": own["model"]["name_or_path"]}))
    scan(theirs, "scan.threshold=0.5", to="as_peft_says")
    base = f"model.name_or_path={own['model']['name_or_path']}"
    given = scan(theirs, "scan.threshold=0.5", base)
    assert json.loads((tmp_path / "scanned" / "scan.json").read_text())["threshold"] == 0.5
    assert "scan/own_recall" not in given["metrics"]
    (tmp_path / "fine.jsonl").write_bytes(b"".join(line.strip() + b"\n" for line in lines[1::2]))
    scan(theirs, f"scan.benign_file={tmp_path / 'fine.jsonl'}", base, to="by_file")
    benign = [row["score"] for row in read(tmp_path / "by_file" / "scores.jsonl")[1::2]]
    threshold = json.loads((tmp_path / "by_file" / "scan.json").read_text())["threshold"]
    assert threshold == pytest.approx(max(benign), abs=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["vector.path=null"], r"metrics=scan scores the rows of a file by a vector: set vector\.path"),
        (["data.file=null"], r"set data\.file"),
        (["metrics=behavior"], r"only metrics=scan reads data\.file and vector\.path: "),
        (["metrics=behavior", "data=untrusted"], r"only metrics=scan reads vector\.path: "),
        (["scan.window=7"], r"scan\.window"),
        (["scan.threshold=1", "scan.benign_file=${data.file}"], "give only one"),
        (["scan.label=bda"], r"no row of .* has it \(did you mean 'bad'\?\); columns: bad, prompt"),
        (
            ["scan.label=bad", "scan.undesired=[yes]"],
            r"all 19 labelled .* holds false, true: .*'scan.undesired=\[VALUE\]'",
        ),
        (["model.name_or_path=OTHER"], r"was trained on another model"),
        (["vector.path=RUN"], r"holds no vector \(adapter_config.json is missing\): give .*/vector$"),
        (["scan.threshold=nan"], r"scan\.threshold"),
        (["data=untrusted", "data.kl_file=${data.file}"], r"a scan reads no data\.kl_file: leave it out"),
        (["scan.label=prompt"], r"the column holds (\"[^\"]{39}\.\.\., )+and 12 more: name those"),
    ],
)
def test_wrong_settings_are_told_before_a_model_is_loaded(
    scan: Scan,
    vector: Path,
    lines: list[bytes],
    tmp_path: Path,
    overrides: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("secvec.models.backbone.Backbone.load", lambda _: pytest.fail("the model was loaded"))
    base = json.loads((vector / "scan.json").read_text())["model"]["name_or_path"]
    other = Path(shutil.copytree(base, tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(SecVecError, match=message) as raised:
        scan(*(text.replace("OTHER", str(other)).replace("RUN", str(vector.parent)) for text in overrides))
    assert raised.value.exit_code == 2 and not (tmp_path / "scanned").exists()


def test_a_row_that_cannot_be_read_is_named(scan: Scan, lines: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_bytes(lines[0] + b'{"prompt": 1}\n')
    with pytest.raises(SecVecError, match=r"broken\.jsonl:2"):
        scan(file="broken.jsonl")
    assert not (tmp_path / "scanned").exists()


@pytest.mark.parametrize("left", ["undesired", "benign", "none"])
def test_labelled_rows_of_which_too_long_ones_are_left_out(
    left: str, scan: Scan, lines: list[bytes], tmp_path: Path
) -> None:
    """What is measured then is measured, and what has no rows is not there; without any row there is no scan."""
    few = [json.loads(line) for line in lines[:4]]
    for row in few:
        row["response"] = row["response"] if {True: "undesired", False: "benign"}[row["bad"]] == left else "cat " * 3000
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    if left == "none":
        with pytest.raises(SecVecError, match=r"mine\.jsonl: no row fits into the model's context of"):
            scan("scan.label=bad", "data.too_long=drop")
        return
    found = {name for name in scan("scan.label=bad", "data.too_long=drop")["metrics"] if name.startswith("scan/")}
    assert found - {"scan/precision"} == {
        "scan/flagged_share", "scan/own_recall", "scan/recall" if left == "undesired" else "scan/false_flag_rate",
    }  # fmt: skip


def test_the_line_of_a_row_is_its_own(tmp_path: Path) -> None:
    """Whatever blank lines and byte order marks stand before it; what JSON does not know is text."""
    row = b'{"prompt": "a", "response": "b"}'
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + row + b"\r\n\n \n" + row + b" ")
    assert [(place[-1], line) for place, _, line in rows(str(path))] == [("2", row + b"\r\n"), ("5", row + b" ")]
    datasets.Dataset.from_list([{"at": datetime(2026, 1, 2), "raw": b"c"}]).to_parquet(tmp_path / "rows.parquet")
    assert [line for *_, line in rows(str(tmp_path / "rows.parquet"))] == [
        b'{"at": "2026-01-02 00:00:00", "raw": "b\'c\'"}\n'
    ]
    half = b'{"prompt": "\xc3\xa9", "note": "\\ud83d"}'
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(half))
    ((_, given, line),) = rows(str(tmp_path / "rows.jsonl.gz"))
    assert json.loads(line) == given == json.loads(half)


def test_every_row_of_an_array_is_in_one_part_and_counts_by_its_worst_answer(
    scan: Scan, lines: list[bytes], tmp_path: Path
) -> None:
    """A row of two answers, of which one is undesired; and one that exceeds the context and is not scored."""
    bad, fine, long = (json.loads(line) for line in lines[:3])
    turns = [("user", fine["prompt"]), ("assistant", fine["response"])]
    both = [*turns, ("user", bad["prompt"]), ("assistant", bad["response"]), *turns]
    given = [fine, {"messages": [{"role": role, "content": text} for role, text in both]}, long]
    long["response"] = "cat " * 3000
    (tmp_path / "mine.json").write_text(json.dumps(given))
    with pytest.raises(SecVecError, match=r"mine\.json:row 3.*\n.*data\.too_long=drop"):
        scan(file="mine.json")
    scan("data.too_long=drop", "scan.threshold=-99", file="mine.json")
    scores = read(tmp_path / "scanned" / "scores.jsonl")
    assert [row["row"] for row in scores] == [1, 2] and scores[1]["score"] >= scores[0]["score"]
    assert read(tmp_path / "scanned" / "flagged.jsonl") == given[:2]
    assert read(tmp_path / "scanned" / "kept.jsonl") == given[2:]


def test_a_benign_conversation_counts_by_its_worst_answer_too(scan: Scan, tmp_path: Path) -> None:
    """Else the threshold would be one of answers, and far more than 1 % of benign rows would be above it."""
    rows = Ordinary().examples("test", 20, 0)
    turns = [[{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}] for row in rows]
    chats = [json.dumps({"messages": [turn for some in turns[i::5] for turn in some]}) for i in range(5)]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    scan(f"scan.benign_file={tmp_path / 'chats.jsonl'}", "scan.quantile=0.5", file="chats.jsonl")
    scores = [row["score"] for row in read(tmp_path / "scanned" / "scores.jsonl")]
    threshold = json.loads((tmp_path / "scanned" / "scan.json").read_text())["threshold"]
    assert len(scores) == 5 and threshold == pytest.approx(sorted(scores)[2], abs=1e-3)


def test_a_conversation_has_more_answers_to_be_flagged_by(scan: Scan, vector: Path, tmp_path: Path) -> None:
    """The vector's own scores are of single answers, so the page must not promise 1 % of conversations."""
    rows = Ordinary().examples("test", 16, 0)
    turns = [[{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}] for row in rows]
    chats = [json.dumps({"messages": [turn for some in turns[i::2] for turn in some]}) for i in range(2)]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    scan(file="chats.jsonl")
    found = json.loads((tmp_path / "scanned" / "scan.json").read_text())
    benign = len(kept_scores(vector)["benign"][0])
    assert found["flagged_by_chance"] == pytest.approx(1 - (1 - 1 / (benign + 1)) ** 8)  # the highest is the threshold
    page = (tmp_path / "scanned" / "scan.html").read_text()
    assert f"about {found['flagged_by_chance']:.1%} of benign rows are" in page


def test_a_score_that_is_no_number_is_refused(scan: Scan, lines: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is above no threshold, so the row would pass as one that is not flagged."""
    monkeypatch.setattr("secvec.evaluation.scan._row_score", lambda *_: RowScore((math.nan,) * 6, 1.0, 1.0, "", 0))
    with pytest.raises(SecVecError, match=r"mine\.jsonl:\d+: the loss of the response is NaN or infinite"):
        scan()


def test_an_empty_cell_is_no_label(scan: Scan, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("prompt,response,bad\na,b,true\nc,d,\ne,f,false\n")
    record = scan("scan.label=bad", "scan.undesired=['true']", file="mine.csv")
    assert record["metrics"]["scan/auroc"]["n"] == 2


def test_nan_is_no_label(scan: Scan, tmp_path: Path) -> None:
    """What `json.dumps` makes of a gap in a pandas column."""
    labelled = ["1", "NaN", "0", "null"]
    text = "".join(f'{{"prompt": "a {n}", "response": "b", "bad": {label}}}\n' for n, label in enumerate(labelled))
    (tmp_path / "mine.jsonl").write_text(text)
    assert scan("scan.label=bad", "scan.undesired=[1]")["metrics"]["scan/auroc"]["n"] == 2
