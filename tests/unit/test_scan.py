"""Scores of rows: the window finds what the mean hides, the words are those that the vector explains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from in_memory import module
from torch import nn

from secvec.behaviors.forbidden_recipe import ForbiddenRecipe
from secvec.data.batch import IGNORE, collate
from secvec.data.embedded import Ordinary
from secvec.data.encode import encode
from secvec.errors import ArtifactError
from secvec.evaluation import scan as scans
from secvec.evaluation.scan import SCORES, WINDOWS, keep_scores, kept_scores, quantile_threshold, scan
from secvec.evaluation.scan_file import auroc, rows
from secvec.models.backbone import fingerprint
from secvec.models.tiny import CONTEXT, build_tiny
from secvec.models.vector import attach_new_vector, vector_off
from secvec.settings.schema import LoraSettings
from secvec.training.losses import token_losses

EXAMPLES = [*ForbiddenRecipe().examples("vector", 3, 0), *Ordinary().examples("vector", 4, 0)]


@pytest.fixture(scope="module")
def world() -> tuple[nn.Module, Any]:
    """A tiny model with a vector that does something, though nothing of use."""
    texts = [text for e in [*EXAMPLES, *Ordinary().examples("align", 100, 0)] for text in (e.prompt, e.response)]
    model, tokenizer = build_tiny(texts, 0)
    model = attach_new_vector(model, LoraSettings(r=4, alpha=8, target_modules="all-linear"), 0.0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return model.eval(), tokenizer


def gaps(world: tuple[nn.Module, Any], example: Any) -> tuple[list[int], list[float]]:
    """The response's tokens and the gap of each, from one row alone."""
    model, tokenizer = world
    (row,) = encode([example], tokenizer, CONTEXT)
    batch = collate([(row, False)])
    here = batch["labels"][:, 1:] != IGNORE
    with torch.no_grad():
        on = token_losses(model, batch)[here]
        with vector_off(model):
            off = token_losses(model, batch)[here]
    return list(row.input_ids[row.num_prompt :]), (off - on).tolist()


def test_a_score_is_the_highest_mean_gap_over_a_window(world: tuple[nn.Module, Any]) -> None:
    found = scan(module(*world), EXAMPLES, window=2, batch_size=3)
    for example, score in zip(EXAMPLES, found, strict=True):
        tokens, values = gaps(world, example)
        assert score.mean_gap == pytest.approx(sum(values) / len(values), abs=1e-4)
        for size in WINDOWS:
            means = [sum(values[i : i + size]) / size for i in range(len(values) - size + 1)]
            assert score.score(size) == pytest.approx(max(means), abs=1e-4)
        means = [sum(values[i : i + 2]) / 2 for i in range(len(values) - 1)]
        start = means.index(max(means))
        inside = world[1].decode(tokens[start : start + 2], skip_special_tokens=True).strip()
        assert inside in score.words and score.words in example.response
        assert example.response.find(score.words, max(0, score.place - 2)) in range(score.place - 2, score.place + 3)
    assert max(abs(score.mean_gap) for score in found) > 0.1, "the vector does nothing: the test sees nothing"


def test_batches_and_order_do_not_matter(world: tuple[nn.Module, Any]) -> None:
    found = scan(module(*world), EXAMPLES)
    again = scan(module(*world), EXAMPLES[::-1], batch_size=1)[::-1]
    assert [s.words for s in found] == [s.words for s in again]
    assert [s.score(3) for s in found] == pytest.approx([s.score(3) for s in again], abs=1e-4)


def test_a_batch_of_long_rows_has_fewer_of_them(world: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scan(module(*world), EXAMPLES)
    sizes: list[list[int]] = []

    def noted(rows: Any) -> Any:
        sizes.append([len(row.input_ids) for row, _ in rows])
        return collate(rows)

    monkeypatch.setattr(scans, "collate", noted)
    scan(module(*world), EXAMPLES)
    assert len(sizes) == 1
    monkeypatch.setattr(scans, "MOST_TOKENS", 2 * max(sizes.pop()))
    found = scan(module(*world), EXAMPLES)
    assert len(sizes) > 1 and all(len(rows) == 1 or len(rows) * max(rows) <= scans.MOST_TOKENS for rows in sizes)
    assert [s.score(3) for s in found] == pytest.approx([s.score(3) for s in whole], abs=1e-4)


def test_a_response_shorter_than_the_window_is_one_window(world: tuple[nn.Module, Any]) -> None:
    from dataclasses import replace

    (score,) = scan(module(*world), [replace(EXAMPLES[0], response="First")], window=6)
    tokens, _ = gaps(world, replace(EXAMPLES[0], response="First"))
    assert len(tokens) < 6 and score.score(6) == pytest.approx(score.mean_gap)
    assert score.words == "First"


def test_the_scores_of_a_vector_belong_to_its_weights(tmp_path: Path, world: tuple[nn.Module, Any]) -> None:
    assert kept_scores(tmp_path) == {}
    (tmp_path / "adapter_config.json").write_text("{}")
    found = scan(module(*world), EXAMPLES)
    keep_scores(tmp_path, {"undesired": found[:3], "benign": found[3:]}, {"model": {"name_or_path": "base"}})
    kept = kept_scores(tmp_path)
    assert kept["vector"] == fingerprint(tmp_path) and kept["model"] == {"name_or_path": "base"}
    assert kept["benign"][2] == pytest.approx([score.score(3) for score in found[3:]], abs=1e-4)
    (tmp_path / "adapter_config.json").write_text('{"r": 2}')
    with pytest.raises(ArtifactError, match="belongs to other weights"):
        kept_scores(tmp_path)
    for broken in ("{", "[]", json.dumps({"vector": fingerprint(tmp_path)})):
        (tmp_path / SCORES).write_text(broken)
        with pytest.raises(ArtifactError, match="damaged"):
            kept_scores(tmp_path)


def test_auroc_counts_pairs_and_half_of_ties() -> None:
    assert auroc([3, 2, 1, 0], [True, True, False, False]) == 1.0
    assert auroc([0, 1, 2, 3], [True, True, False, False]) == 0.0
    assert auroc([1, 1, 1], [True, False, False]) == 0.5
    assert auroc([2, 0, 1, 0], [True, True, False, False]) == 0.625


def test_rows_are_the_bytes_of_json_lines_and_json_of_all_else(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = ['{"a": "é\u2028"}\r\n'.encode(), b'{"b":1}']
    file.write_bytes(lines[0] + b"\n  \n" + lines[1])
    assert list(rows(str(file))) == [(f"{file}:1", {"a": "é\u2028"}, lines[0]), (f"{file}:4", {"b": 1}, lines[1])]
    for name, content in (("a.json", b'[{"b":1},\n{"b":2}]'), ("a.csv", b"b\n1\n2\n")):
        (tmp_path / name).write_bytes(content)
        assert [json.loads(line)["b"] in (1, "1", 2, "2") for _, _, line in rows(str(tmp_path / name))] == [True, True]


def test_the_limit_is_a_score_of_a_benign_row_that_few_exceed() -> None:
    """Of four scores at most half lie above the median, at most a quarter above the third quartile: the next higher."""
    scores = [4.0, 1.0, 3.0, 2.0]
    assert [quantile_threshold(scores, quantile) for quantile in (0.0, 0.5, 0.7, 1.0)] == [1.0, 3.0, 4.0, 4.0]
