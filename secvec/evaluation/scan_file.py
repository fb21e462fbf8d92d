"""A file of rows, scanned: scores.jsonl, flagged.jsonl and kept.jsonl, and what the page of a scan shows."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from scipy.stats import rankdata

from secvec.data.example import Example
from secvec.data.lengths import Fitting
from secvec.data.rows import read_rows
from secvec.data.tables import COMPRESSED, rows_of
from secvec.data.tokens import encoded
from secvec.errors import ArtifactError, ConfigError, DataError, nearest, several, shortened
from secvec.evaluation.scan import RowScore, kept_scores, quantile_threshold, scan, share_above
from secvec.metrics import Measurement, Measurements, proportion
from secvec.models.backbone import Backbone
from secvec.models.vector import SCORES, check_adapter
from secvec.runs.files import atomic_path, write_atomic
from secvec.runs.processes import main_process
from secvec.settings.schema import ModelSettings

if TYPE_CHECKING:
    from secvec.config.schema import EvaluateConfig, ScanSettings
    from secvec.module import SecVecModule

log = logging.getLogger(__name__)

MOST_SHOWN, NEAR = 30, 6
"""Rows that the page shows: the highest, and those next below the threshold."""


@dataclass(frozen=True)
class ScanFile:
    """A file to scan, read and checked; no model is loaded yet."""

    config: EvaluateConfig
    source: str
    vector: Path
    examples: Sequence[Example]
    """A row may give several."""
    benign: Sequence[Example]
    """Of `scan.benign_file`."""
    labels: Mapping[str, bool]
    """Whether a row is undesired, by its place (`file:line`); rows without a label are left out."""
    kept: Mapping[str, Any]
    """`secvec.evaluation.scan.kept_scores` of the vector."""

    @classmethod
    def read(cls, config: EvaluateConfig) -> ScanFile:
        """Raises DataError, ArtifactError; ConfigError where nothing says what is a high score."""
        settings, vector, file = config.scan, config.vector.path, config.data.file
        assert vector is not None and file is not None
        check_adapter(vector)
        kept = kept_scores(vector)
        if settings.threshold is None and settings.benign_file is None and not any(kept.get("benign", [])):
            raise ConfigError(
                f"{vector} holds no scores of benign rows of its own ({SCORES}; stage=vector writes it, from its KL "
                "rows), so nothing says what is a high score: give scan.benign_file=FILE with rows that are known to "
                "be benign, or scan.threshold=NATS"
            )
        benign = [] if settings.benign_file is None else read_rows(settings.benign_file, "ordinary")
        examples = read_rows(file, "neutral", unique=False)
        return cls(config, file, vector, examples, benign, _labels(file, settings), kept)

    def backbone(self) -> Backbone:
        """The model that the vector was trained on: as given, else as it says itself. Raises ArtifactError."""
        settings: ModelSettings = self.config.model
        vector = self.vector
        if settings.name_or_path is None:
            # of an adapter that was saved from Python PEFT knows the model
            kept = self.kept.get("model") or {"name_or_path": check_adapter(vector).get("base_model_name_or_path")}
            if not kept["name_or_path"]:
                raise ArtifactError(
                    f"{vector} does not say which model it was trained on: give model.name_or_path=FOLDER"
                )
            settings = ModelSettings.model_validate({"name": None} | kept)
        backbone = Backbone.of(settings)
        backbone.check_vector(vector)
        return backbone

    def scan(self, module: SecVecModule, folder: Path) -> Measurements:
        """Scores all rows and writes the results into `folder`. Every process must call it."""
        config, settings = self.config, self.config.scan
        tokenizer, context, cache = module.backbone.tokenizer, module.backbone.context, config.paths.cache
        fitting = Fitting(lambda rows, size: encoded(rows, tokenizer, size, cache), context, config.data.too_long)
        examples, benign = (fitting.fit(list(rows)) for rows in (self.examples, self.benign))
        fitting.check()
        for file, given, left in ((self.source, self.examples, examples), (settings.benign_file, self.benign, benign)):
            if given and not left:
                raise DataError(
                    f"{file}: no row fits into the model's context of {context} tokens, so there is no score"
                )
        found = scan(module, [*examples, *benign], settings.window, config.evaluation.batch_size, config.trainer, cache)
        best, known = (
            _worst_answers(scores, some, settings.window)
            for scores, some in ((found[: len(examples)], examples), (found[len(examples) :], benign))
        )
        result = ScanResult(self, best, [score.score(settings.window) for score, _ in known.values()])
        if main_process():
            result.write(folder)
        return result.metrics()


def _worst_answers(
    scores: Sequence[RowScore], examples: Sequence[Example], window: int
) -> dict[str, tuple[RowScore, Example]]:
    """By the place of a row its highest score and the sample that has it. A conversation counts by its worst answer."""
    best: dict[str, tuple[RowScore, Example]] = {}
    for one in zip(scores, examples, strict=True):
        before = best.setdefault(one[1].source, one)
        if one[0].score(window) > before[0].score(window):
            best[one[1].source] = one
    return best


@dataclass(frozen=True)
class ScanResult:
    """The scores of a scanned file."""

    file: ScanFile
    best: Mapping[str, tuple[RowScore, Example]]
    """The highest score of each row and the sample that has it, by the row's place."""
    benign: Sequence[float]
    """Scores of `scan.benign_file`."""

    @property
    def settings(self) -> ScanSettings:
        """Those of the scan."""
        return self.file.config.scan

    def own(self, kind: str) -> list[float]:
        """The scores of the vector's own samples, for this window."""
        tables = self.file.kept.get(kind)
        return list(tables[self.settings.window - 1]) if tables else []

    @cached_property
    def threshold(self) -> float:
        """A row above it is flagged."""
        if self.settings.threshold is not None:
            return self.settings.threshold
        return quantile_threshold(self.benign or self.own("benign"), self.settings.quantile)

    @property
    def by_chance(self) -> float:
        """The share of benign rows above a threshold that `scan.quantile` sets.

        A row counts by the highest of its answers, and the vector's own scores are those of single answers.
        """
        above = share_above(len(self.benign or self.own("benign")), self.settings.quantile)
        if self.benign:
            return above
        answers = Counter(example.source for example in self.file.examples if example.source in self.best)
        return 1 - fmean((1 - above) ** number for number in answers.values())

    def score(self, place: str) -> float:
        """The score of a row."""
        return self.best[place][0].score(self.settings.window)

    def metrics(self) -> Measurements:
        """`scan/...`: the flagged share; where rows are labelled, how well the scan tells them apart."""
        most, labels = self.threshold, {place: bad for place, bad in self.file.labels.items() if place in self.best}
        flagged = {place for place in self.best if self.score(place) > most}
        found = {"scan/flagged_share": proportion(len(flagged), len(self.best))}
        if own := self.own("undesired"):
            found["scan/own_recall"] = proportion(sum(score > most for score in own), len(own))
        if not labels:
            return found
        bad = {place for place, undesired in labels.items() if undesired}
        good, hits = labels.keys() - bad, flagged & labels.keys()
        for name, hit, of in (("recall", bad, bad), ("false_flag_rate", good, good), ("precision", bad, hits)):
            if of:
                found[f"scan/{name}"] = proportion(len(hits & hit), len(of))
        if not (bad and good):  # the others were left out as too long
            return found
        undesired = list(labels.values())
        for name, scores in (
            ("auroc", [self.score(place) for place in labels]),
            ("auroc_of_mean", [self.best[place][0].mean_gap for place in labels]),
        ):
            found[f"scan/{name}"] = Measurement(auroc(scores, undesired), n=len(labels))
        return found

    def write(self, folder: Path) -> None:
        """scores.jsonl, flagged.jsonl and kept.jsonl, and scan.json for the page."""
        most = self.threshold
        with (
            atomic_path(folder / "scores.jsonl") as scores,
            atomic_path(folder / "flagged.jsonl") as flagged,
            atomic_path(folder / "kept.jsonl") as kept,
            scores.open("w", encoding="utf-8") as scored,
            flagged.open("wb") as high,
            kept.open("wb") as low,
        ):
            for place, _, line in rows(self.file.source):
                above = place in self.best and self.score(place) > most
                (high if above else low).write(line)
                if place in self.best:  # a row may hold no answer that is trained
                    scored.write(json.dumps(self._row(place, above), ensure_ascii=False) + "\n")
        order = sorted(self.best, key=self.score, reverse=True)
        number = sum(self.score(place) > most for place in order)
        shown = [*order[: min(number, MOST_SHOWN)], *order[number : number + NEAR]]
        about = self.settings.model_dump(mode="json") | {
            "file": str(self.file.source),
            "vector": str(self.file.vector),
            "sensitive": self.file.kept.get("sensitive", True),
            "given_threshold": self.settings.threshold,
            "threshold": most,
            "own": {kind: self.own(kind) for kind in ("undesired", "benign")},
            "known_benign": self.benign,
            "flagged_by_chance": self.by_chance,
            "metrics": {name: asdict(value) for name, value in self.metrics().items()},
            "shown": [self._shown(place) for place in shown],
        }
        write_atomic(folder / SCORES, json.dumps(about, ensure_ascii=False) + "\n")

    def _shown(self, place: str) -> dict[str, Any]:
        score, example = self.best[place]
        texts = {"prompt": example.prompt, "response": example.response, "place": score.place}
        return self._row(place, self.score(place) > self.threshold) | texts

    def _row(self, place: str, flagged: bool) -> dict[str, Any]:
        found = self.best[place][0]
        file, _, number = place.rpartition(":")
        number = number.removeprefix("row ")
        row: dict[str, Any] = {
            **({} if Path(file) == Path(self.file.source) else {"file": file}),
            "row": int(number) if number.isdecimal() else number,
            "score": round(self.score(place), 4),
            "mean_gap": round(found.mean_gap, 4),
            "loss_off": round(found.loss_off, 4),
            "loss_on": round(found.loss_on, 4),
            "flagged": flagged,
            "words": found.words,
        }
        return row | ({"undesired": self.file.labels.get(place)} if self.file.labels else {})


def rows(source: str) -> Iterator[tuple[str, Any, bytes]]:
    """The place of each row (as `Example.source`), its content, and its line for a file of JSON lines.

    Of JSON lines it is the very line of `source`; of a folder without the byte order mark of a file, and with the line
    end that its last line may lack. Rows of other formats are written as JSON, in which times and bytes are text.
    """
    opened, of_many = "", Path(source).is_dir()
    lines: Iterator[tuple[int, bytes]] = iter(())
    with ExitStack() as stack:
        for place, row in rows_of(source):
            file, _, number = place.rpartition(":")
            if not number.isdecimal() or Path(file).suffix in COMPRESSED:
                yield place, row, _as_line(row)
                continue
            if file != opened:
                stack.close()
                opened, lines = file, enumerate(stack.enter_context(Path(file).open("rb")), start=1)
            line = next(line for n, line in lines if n == int(number))
            yield place, row, line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\n") + b"\n" if of_many else line


def _as_line(row: Any) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # half a character
        return json.dumps(row, default=str).encode() + b"\n"


def auroc(scores: Sequence[float], undesired: Sequence[bool]) -> float:
    """The chance that an undesired row scores above a benign one (ties: half), from the ranks (Mann-Whitney)."""
    bad, total = sum(undesired), len(undesired)
    above = sum(rank for rank, is_bad in zip(rankdata(scores), undesired, strict=True) if is_bad) - bad * (bad + 1) / 2
    return float(above / (bad * (total - bad)))


def _labels(file: str, settings: ScanSettings) -> dict[str, bool]:
    """Whether each labelled row is undesired. Raises DataError for a column that is not there or tells nothing."""
    if settings.label is None:
        return {}
    values: dict[str, Any] = {}
    columns: set[str] = set()
    for place, row in rows_of(file):
        columns |= row.keys()
        value = row.get(settings.label)
        if value not in (None, "") and value == value:  # a csv has no null, and NaN is pandas' null
            values[place] = value
    labels = {place: value in settings.undesired for place, value in values.items()}
    if not values:
        hint = nearest(settings.label, columns)
        raise DataError(
            f"scan.label={settings.label}: no row of {file} has it{hint}; columns: {', '.join(sorted(columns))}"
        )

    def held(*which: bool) -> str:
        """Values of the column that mean undesired (True) or benign, the first of them."""
        found = {json.dumps(value, default=str) for place, value in values.items() if labels[place] in which}
        return ", ".join(several([shortened(text, 40) for text in sorted(found)], 8))

    if len(set(labels.values())) == 1:
        raise DataError(
            f"scan.label={settings.label}: all {len(labels)} labelled rows of {file} would be "
            f"{'undesired' if any(labels.values()) else 'benign'} by scan.undesired={settings.undesired}; the column "
            f"holds {held(True, False)}: name those that mean undesired, in quotes for the shell: "
            "'scan.undesired=[VALUE]'"
        )
    bad = sum(labels.values())
    log.info(
        "scan.label=%s: %d undesired rows (%s), %d benign ones (%s)",
        *(settings.label, bad, held(True), len(labels) - bad, held(False)),
    )
    return labels
