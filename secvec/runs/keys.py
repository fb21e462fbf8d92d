"""Keys: 12 hex digits that name a run, or a cached artifact, by its content. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import secvec
from secvec.runs.content import by_content, mapped

NOT_IN_KEY = {"stage", "paths", "logger", "recipe", "run_dir", "sweep", "force", "plan", "key", "hydra", "checkpoint"}
"""Settings that do not change results: where files go, which part of the run is wanted. See `key_settings`."""

READ = ("behavior", "data", "vector", "scan", "model", "judge", "answer_judge", "task_folder")
"""Settings whose files and folders count by their content, not by their path. Others may name what a run writes."""

VARIES = "SECVEC_VARIES"
"""Environment variable by which the launcher tells a job the overrides, one per line, that other jobs lack."""


def content_key(content: Any) -> str:
    """The key of `content` (JSON-able) under this version of the package. 2 and 2.0 are the same content."""
    text = json.dumps([secvec.__version__, mapped(content, _as_float)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def key_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a composed config that count for the key of the run: the only rule of what does not.

    Left out: NOT_IN_KEY, the caches of the judges, and the vector under a defense that ignores it, but for its behavior
    beside untrusted data. `num_threads` counts: it changes the order of floating-point sums.
    """
    unused = {"vector"} if ignores_vector(config.get("defense") or {}) else set()
    settings = {name: value for name, value in config.items() if name not in NOT_IN_KEY | unused}
    behavior = (config.get("vector") or {}).get("behavior")
    streams = (config.get("data") or {}).get("benign") or {}
    if unused and behavior and any(stream and stream.get("kind") == "untrusted" for stream in streams.values()):
        settings["vector"] = {"behavior": behavior}  # its prompts are left out of the untrusted test rows
    for role in ("judge", "answer_judge"):
        if isinstance(judge := settings.get(role), Mapping):
            settings[role] = {name: value for name, value in judge.items() if name != "cache"}
    return settings


def ignores_vector(defense: Mapping[str, Any]) -> bool:
    """Whether neither the vector nor its samples act under these settings of a defense."""
    return defense.get("uses_vector") is False and not defense.get("uses_samples")


def run_key(config: Mapping[str, Any], keep: Path | None = None) -> str:
    """The key of a run: of the settings that count, and of the content of the files and folders that they name.

    `keep` is the folder where digests of large files are kept.
    """
    settings = key_settings(config)
    return content_key({name: by_content(v, keep, name) if name in READ else v for name, v in settings.items()})


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
