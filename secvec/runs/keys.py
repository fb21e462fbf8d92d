"""Keys by content: what tells one run, or one cached artifact, from another. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import secvec

NOT_IN_KEY = {"stage", "paths", "logger", "run_dir", "sweep", "force", "plan", "content"}
"""Settings that do not shape results: where things go, which part is run."""

OF_DATA = ("behavior", "data", "vector")
"""Settings that name data files. Others name files that a run writes (a judge's cache)."""

VARIES = "SECVEC_VARIES"
"""Environment variable in which the launcher gives a job the overrides, one a line, that other jobs do not share."""


def _alike(content: Any) -> Any:
    """The same number written in another way (2, 2.0) is the same content."""
    if isinstance(content, dict):
        return {key: _alike(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_alike(value) for value in content]
    return float(content) if isinstance(content, int) and not isinstance(content, bool) else content


def content_key(content: Any) -> str:
    """12 hex digits that name `content` (JSON-able) under this version of the program."""
    text = json.dumps([secvec.__version__, _alike(content)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_key(settings: Mapping[str, Any]) -> str:
    """Key of all that shapes the results of a run: its settings, and what is in the data files that they name."""
    files = _files([settings.get(name) for name in OF_DATA])
    return content_key([settings, files] if files else settings)


def _files(content: Any) -> dict[str, str]:
    """Digest by path."""
    if isinstance(content, dict | list | tuple):
        parts = content.values() if isinstance(content, dict) else content
        return {path: digest for part in parts for path, digest in _files(part).items()}
    if not isinstance(content, str) or not os.path.isfile(content):  # noqa: PTH113 (Path's raises for a long text)
        return {}
    with Path(content).open("rb") as file:
        return {content: hashlib.file_digest(file, "sha256").hexdigest()}
