"""Names by content: the key of a run and its folder's name; and the nearest of several names. Imports no torch."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import secvec

NOT_IN_KEY = {"stage", "paths", "logger", "run_dir", "sweep", "force", "plan", "content"}
"""Settings that do not shape results: where things go, which part is run."""

OF_DATA = ("behavior", "data", "vector")
"""Settings that name data files. Others name files that a run writes (a judge's cache)."""

BUILT_IN = ("tiny", "tiny_joint")
"""Models whose recipe is for the weights that are built in: with a `name_or_path` it is another model."""


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


def composed(root: DictConfig) -> dict[str, Any]:
    """All that shapes the results of a run, from its composed config."""
    plain: dict[str, Any] = {}
    for name in root:
        if name not in {*NOT_IN_KEY, "hydra"}:
            node = root._get_node(name)
            plain[str(name)] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else root[name]
    return plain


def run_name(root: DictConfig) -> str:
    """Folder name of a run, from its composed config: readable parts and a key of all that shapes its results."""
    plain = composed(root)
    model = plain["model"]
    shown = model.get("name") if not (model.get("name") in BUILT_IN and model.get("name_or_path")) else None
    shown = shown or str(model.get("name_or_path")).rstrip("/").rpartition("/")[2]
    defense = plain.get("defense", {}).get("name", "evaluate")
    return f"{defense}-{plain['behavior'].get('name')}-{shown}-s{plain.get('seed')}-{run_key(plain)[:8]}"


def register_resolvers() -> None:
    """For the yaml files: `${run_name:}`, `${content:}`, and `${by:KEY,{a: 1, b: 2}}`: what the table has for KEY."""
    OmegaConf.register_new_resolver("run_name", lambda *, _root_: run_name(_root_), replace=True)
    OmegaConf.register_new_resolver("content", lambda *, _root_: run_key(composed(_root_)), replace=True)
    OmegaConf.register_new_resolver("by", lambda key, table: table[key], replace=True)


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when nothing is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""
