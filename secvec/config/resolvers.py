"""What the yaml files can compute: the key and the folder name of a run. Imports no torch."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from secvec.runs.keys import NOT_IN_KEY, run_key
from secvec.settings.schema import BUILT_IN


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
