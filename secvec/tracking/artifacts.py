"""The artifacts of a run: data, backbone, vector, fine-tuned backbone, evaluation."""

import json
import re
from pathlib import Path
from typing import Any

from secvec.runs.content import file_digest
from secvec.runs.record import Record
from secvec.tracking.base import Artifact

HAZARDOUS = "hazardous-security-vector"
WEIGHTS = "adapter_model.safetensors"


def artifacts(folder: Path, record: Record, upload_vector: bool) -> list[Artifact]:
    """The artifacts in `folder`, each after those that it was made from.

    No text of the data is sent, and no weights; with `upload_vector`, those of the vector are.
    """
    data = {split: _data(split, record) for split in record.data.sha256}
    base = _base(record)

    def made_from(split: str, *others: Artifact) -> tuple[str, ...]:
        return tuple(source.name for source in (*base, *others, *([data[split]] if split in data else [])))

    vectors = _vectors(folder, record, made_from("vector"), upload_vector)
    backbone = _backbone(folder, record, made_from("finetune", *vectors))
    evaluation = _evaluation(folder, record, made_from("test", *vectors, *backbone))
    return [*data.values(), *base, *vectors, *backbone, *evaluation]


def _data(split: str, record: Record) -> Artifact:
    digest, counts = record.data.sha256[split], record.data.counts[split]
    facts = {"split": split, "sha256": digest, "counts": counts, "behavior": record.behavior, "seed": record.seed}
    about = f"Data of split {split}: its hash and counts. The text itself is not sent."
    return Artifact(f"data-{split}-{digest[:12]}", "dataset", about, facts, used=True)


def _base(record: Record) -> list[Artifact]:
    if not (base := record.base):
        return []
    facts = {"model": record.model, "fingerprint": base.fingerprint, "config": record.config["model"]}
    about = "The backbone before fine-tuning: a reference, its weights are not sent."
    return [Artifact(f"backbone-{base.fingerprint}", "backbone", about, facts, used=True)]


def _vectors(folder: Path, record: Record, made_from: tuple[str, ...], upload: bool) -> list[Artifact]:
    """The vectors that the run trained, or the one that `vector.path` gave it, if it was used."""
    given = record.config["vector"]["path"] if "vector" in record.ledger else None
    paths = [Path(given)] if given else sorted(folder.glob("vector*/"))
    sources = () if given else made_from
    return [_vector(path, record, bool(given), sources, upload) for path in paths if (path / WEIGHTS).is_file()]


def _vector(path: Path, record: Record, given: bool, made_from: tuple[str, ...], upload: bool) -> Artifact:
    digest = file_digest(path / WEIGHTS)
    known = {"behavior": record.behavior, **_json(path / "secvec.json"), **_json(path / "adapter_config.json")}
    facts = {name: known.get(name) for name in ("behavior", "backbone", "r", "lora_alpha", "target_modules")}
    facts |= {"hazardous": True, "sha256": digest, "weights": "sent" if upload else "not sent"}
    about = (
        f"Security vector, HAZARDOUS BY DESIGN: with it active the model shows the behavior {known['behavior']}. "
        "Deactivate it before the model answers anybody. Never serve it."
    )
    files = tuple(sorted(file for file in path.iterdir() if file.is_file())) if upload else ()
    name = re.sub(r"[^\w.-]", "-", str(known["behavior"]), flags=re.ASCII)[:100]  # what W&B takes
    return Artifact(f"vector-{name}-{digest[:12]}", HAZARDOUS, about, facts, made_from, given, files)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _backbone(folder: Path, record: Record, made_from: tuple[str, ...]) -> list[Artifact]:
    path = folder / "backbone"
    if "finetune" not in record.stages or not path.is_dir():
        return []
    from secvec.models.backbone import fingerprint  # slow to import

    mark = fingerprint(path)
    facts = {"fingerprint": mark, "defense": record.defense, "tune": record.tune, "run": record.run}
    about = "The fine-tuned backbone, vector off: a reference, its weights stay in the run folder."
    return [Artifact(f"backbone-{mark}", "backbone", about, facts, made_from)]


def _evaluation(folder: Path, record: Record, made_from: tuple[str, ...]) -> list[Artifact]:
    path = folder / "record.json"
    if record.status == "running" or not path.is_file():
        return []
    facts = {"status": record.status, "defense": record.defense, "seed": record.seed, "key": record.key}
    about = "The run's record: config, provenance, data hashes, metrics with intervals and n."
    return [Artifact(f"evaluation-{record.key}", "evaluation", about, facts, made_from, files=(path,))]
