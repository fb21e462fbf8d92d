"""What the yaml files compute: the key and the folder name of a run, the name of a sweep. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from secvec.runs.keys import NOT_IN_KEY, content_key, key_settings, run_key
from secvec.settings.schema import BUILT_IN


def register_resolvers() -> None:
    """Registers `${key:}`, `${run_name:}`, `${sweep_name:}` and what settings are made of.

    `${by:KEY,{a: 1, b: 2}}` is the table's entry for KEY; `${or_all:N}` is N, and null (all there are) for a user's own
    `data.file`, which has as many rows as it has; `${or_none:N}` is N, and 0 there.
    """
    OmegaConf.register_new_resolver("key", lambda *, _root_: key_of(_root_), replace=True)
    OmegaConf.register_new_resolver("run_name", lambda *, _root_: run_name(_root_), replace=True)
    OmegaConf.register_new_resolver("sweep_name", lambda *, _root_: sweep_name(_root_), replace=True)
    OmegaConf.register_new_resolver("or_all", lambda n, *, _root_: None if _root_.data.file else n, replace=True)
    OmegaConf.register_new_resolver("or_none", lambda n, *, _root_: 0 if _root_.data.file else n, replace=True)
    OmegaConf.register_new_resolver("by", lambda key, table: table[key], replace=True)


def resolved(root: DictConfig) -> dict[str, Any]:
    """The composed config as plain values, without the settings that do not change results."""
    config = {str(name): root[name] for name in root if name not in NOT_IN_KEY and not OmegaConf.is_missing(root, name)}
    return {n: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for n, v in config.items()}


def key_of(root: DictConfig) -> str:
    """The key of the run that a composed config describes; digests of large files are kept in its cache."""
    cache = OmegaConf.select(root, "paths.cache")
    return run_key(resolved(root), Path(cache).expanduser() / "digests" if cache else None)


def run_name(root: DictConfig) -> str:
    """Folder name of a run: defense, behavior, model, seed and key."""
    config = resolved(root)
    if config.get("metrics") == "scan":  # it is of the vector's behavior and model
        return f"scan-{Path(str(config['vector']['path'])).resolve().parent.name}-{key_of(root)[:8]}"
    model = config["model"]
    shown = model.get("name") if not (model.get("name") in BUILT_IN and model.get("name_or_path")) else None
    shown = str(shown or model.get("name_or_path")).rstrip("/").rpartition("/")[2]
    defense = config.get("defense", {}).get("name", "evaluate")
    return f"{defense}-{config['behavior'].get('name')}-{shown}-s{config.get('seed')}-{key_of(root)[:8]}"


def setting_of(override: Override) -> str:
    """What an override sets: a key, a group, or a group at another place (`GROUP@PLACE`), which is another setting."""
    return str(override.get_key_element()).lstrip("+~")


def sweep_name(root: DictConfig) -> str:
    """Folder name of a multirun: `sweep`, or `multirun/` with what is swept and a key of the whole sweep.

    The key is that of the swept values, the sweeper's settings and the settings that all jobs share. `n_trials` does
    not count: a search with more trials goes on in its folder.
    """
    if root.get("sweep"):
        return str(root.sweep)
    given = OverridesParser.create().parse_overrides(list(root.hydra.overrides.task))
    swept = {setting_of(override): override.input_line for override in given if override.is_sweep_override()}
    sweeper: dict[str, Any] = OmegaConf.to_container(root.hydra.sweeper, resolve=True)  # type: ignore[assignment]
    sweeper.pop("n_trials", None)
    names = [*swept, *(sweeper.get("params") or {}), *(sweeper.get("space") or {})]
    swept = {name: text for name, text in swept.items() if name.partition(".")[0] not in NOT_IN_KEY}
    key = content_key([key_settings(resolved(root)), sorted(map(str, swept.values())), sweeper])[:8]
    shown = "-".join(re.sub(r"[^\w.]+", ".", str(name)) for name in dict.fromkeys(names))
    return f"multirun/{shown[:80]}-{key}" if shown else f"multirun/{key}"
