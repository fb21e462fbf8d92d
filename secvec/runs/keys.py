"""Keys: 12 hex digits that name a run, or a cached artifact, by its content. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import secvec

NOT_IN_KEY = {"stage", "paths", "logger", "recipe", "run_dir", "sweep", "force", "plan", "key", "hydra"}
"""Settings that do not change results: where files go, which part of the run is wanted. See `key_settings`."""

OF_DATA = ("behavior", "data", "vector", "scan")
"""Settings whose file names count by the content of the files. Other settings may name files that a run writes."""

VARIES = "SECVEC_VARIES"
"""Environment variable by which the launcher tells a job the overrides, one per line, that other jobs lack."""


def content_key(content: Any) -> str:
    """The key of `content` (JSON-able) under this version of the package. 2 and 2.0 are the same content."""
    text = json.dumps([secvec.__version__, _with_floats(content)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def key_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a composed config that count for the key of the run: the only rule of what does not.

    Left out: NOT_IN_KEY, the cache of the judge, and the vector under a defense that uses none. `num_threads` counts:
    it changes the order of floating-point sums.
    """
    unused = {"vector"} if (config.get("defense") or {}).get("uses_vector") is False else set()
    settings = {name: value for name, value in config.items() if name not in NOT_IN_KEY | unused}
    if isinstance(judge := settings.get("judge"), Mapping):
        settings["judge"] = {name: value for name, value in judge.items() if name != "cache"}
    return settings


def run_key(config: Mapping[str, Any]) -> str:
    """The key of a run: of the settings that count, and of the data files that they name."""
    settings = key_settings(config)
    files = _digests([settings.get(name) for name in OF_DATA])
    return content_key([settings, files] if files else settings)


def _with_floats(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _with_floats(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_floats(value) for value in content]
    return float(content) if isinstance(content, int) and not isinstance(content, bool) else content


def _digests(content: Any) -> dict[str, str]:
    """SHA-256 of every file that `content` names, by path."""
    if isinstance(content, Mapping | list | tuple):
        parts = content.values() if isinstance(content, Mapping) else content
        return {path: digest for part in parts for path, digest in _digests(part).items()}
    if not isinstance(content, str) or not os.path.isfile(content):  # noqa: PTH113 (Path's raises for a long text)
        return {}
    with Path(content).open("rb") as file:
        return {content: hashlib.file_digest(file, "sha256").hexdigest()}
