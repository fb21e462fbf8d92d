"""The artifacts of a run: data, backbone, vector, fine-tuned backbone, evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secvec.runs.record import Record
from secvec.tracking.base import Artifact

HAZARDOUS = "hazardous-security-vector"
WEIGHTS = "adapter_model.safetensors"


def artifacts(folder: Path, record: Record, upload_vector: bool) -> list[Artifact]:
    """The artifacts in `folder`, each after those that it was made from.

    No text of the data is sent, and no weights; with `upload_vector`, those of the vector are.
    """
    data = {split: _data(split, record) for split in record.data.sha256}

    def of(split: str) -> list[Artifact]:
        return [data[split]] if split in data else []

    base = list(_base(record))
    vector = list(_vector(folder, record, [*base, *of("vector")], upload_vector))
    backbone = list(_backbone(folder, record, [*base, *vector, *of("finetune")]))
    evaluation = list(_evaluation(folder, record, [*base, *vector, *backbone, *of("test")]))
    return [*data.values(), *base, *vector, *backbone, *evaluation]


def _names(sources: list[Artifact]) -> tuple[str, ...]:
    return tuple(source.name for source in sources)


def _data(split: str, record: Record) -> Artifact:
    digest, counts = record.data.sha256[split], record.data.counts[split]
    facts = {"split": split, "sha256": digest, "counts": counts, "behavior": record.behavior, "seed": record.seed}
    about = f"Data of split {split}: its hash and counts. The text itself is not sent."
    return Artifact(f"data-{split}-{digest[:12]}", "dataset", about, facts, used=True)


def _base(record: Record) -> Iterator[Artifact]:
    if base := record.base:
        facts = {"model": record.model, "fingerprint": base.fingerprint, "config": record.config["model"]}
        about = "The backbone before fine-tuning: a reference, its weights are not sent."
        yield Artifact(f"backbone-{base.fingerprint}", "backbone", about, facts, used=True)


def _vector(folder: Path, record: Record, sources: list[Artifact], upload: bool) -> Iterator[Artifact]:
    """The vectors that the run trained, or the one that `vector.path` gave it, if it was used."""
    given = record.config["vector"]["path"] if "vector" in record.ledger else None
    for path in [Path(given)] if given else sorted(folder.glob("vector*/")):
        if (path / WEIGHTS).is_file():
            yield _one_vector(path, record, bool(given), () if given else _names(sources), upload)


def _one_vector(path: Path, record: Record, given: bool, made_from: tuple[str, ...], upload: bool) -> Artifact:
    with (path / WEIGHTS).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    known = {"behavior": record.behavior, **_json(path / "secvec.json"), **_json(path / "adapter_config.json")}
    facts = {name: known.get(name) for name in ("behavior", "backbone", "r", "lora_alpha", "target_modules")}
    facts |= {"hazardous": True, "sha256": digest, "weights": "sent" if upload else "not sent"}
    about = (
        f"Security vector, HAZARDOUS BY DESIGN: with it active the model shows the behavior {known['behavior']}. "
        "Deactivate it before the model answers anybody. Never serve it."
    )
    files = tuple(sorted(file for file in path.iterdir() if file.is_file())) if upload else ()
    return Artifact(f"vector-{known['behavior']}-{digest[:12]}", HAZARDOUS, about, facts, made_from, given, files)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _backbone(folder: Path, record: Record, sources: list[Artifact]) -> Iterator[Artifact]:
    path = folder / "backbone"
    if "finetune" in record.stages and path.is_dir():
        from secvec.models.backbone import fingerprint  # slow to import

        mark = fingerprint(path)
        facts = {"fingerprint": mark, "defense": record.defense, "tune": record.tune, "run": record.run}
        about = "The fine-tuned backbone, vector off: a reference, its weights stay in the run folder."
        yield Artifact(f"backbone-{mark}", "backbone", about, facts, _names(sources))


def _evaluation(folder: Path, record: Record, sources: list[Artifact]) -> Iterator[Artifact]:
    path = folder / "record.json"
    if record.status != "running" and path.is_file():
        facts = {"status": record.status, "defense": record.defense, "seed": record.seed, "key": record.key}
        about = "The run's record: config, provenance, data hashes, metrics with intervals and n."
        yield Artifact(f"evaluation-{record.key}", "evaluation", about, facts, _names(sources), files=(path,))
