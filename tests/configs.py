"""Configs as a command line composes them, in a fraction of the time."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from secvec.config.resolvers import register_resolvers

CONF = Path(__file__).parents[1] / "conf"
CHOICES = sorted(file.relative_to(CONF).with_suffix("") for file in CONF.glob("*/**/*.yaml"))
CHOICES = [choice for choice in CHOICES if choice.parts[0] != "hydra" and choice.name[0] != "_"]
"""Launchers and sweepers are in test_sweep.py; what choices share (`_NAME`) is none."""
GROUPS = {choice.parts[0] for choice in CHOICES}
PARSER = OverridesParser.create()


def by_hydra(*overrides: str, root: str = "train", with_hydra: bool = False) -> DictConfig:
    """What Hydra composes; a quarter of a second."""
    GlobalHydra.instance().clear()
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(root, ["run_dir=somewhere", *overrides], return_hydra_config=with_hydra)


by_hydra_once = lru_cache(by_hydra)


def composed(*overrides: str, root: str = "train") -> DictConfig:
    """The same: choices of groups are composed once, values come on top."""
    chosen = [text for text in overrides if re.split("[=@]", text.lstrip("+"))[0] in GROUPS or text[0] == "~"]
    chosen += [text for text in overrides if text.startswith("hydra.")]
    config = by_hydra_once(*chosen, root=root).copy()
    OmegaConf.set_struct(config, False)
    for text in overrides:
        if text not in chosen:
            given = PARSER.parse_override(text)
            OmegaConf.update(config, given.get_key_element().lstrip("+"), given.value())
    return config
