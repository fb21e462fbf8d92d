"""From Hydra's composed yaml to typed settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from secvec.errors import ConfigError
from secvec.settings.messages import all_faults, describe

Config = TypeVar("Config", bound=BaseModel)


def load(cfg: DictConfig, schema: type[Config]) -> Config:
    """`cfg` as a `schema`. Raises ConfigError with every fault: what was given, what is allowed, the nearest match."""
    try:
        values: dict[str, Any] = _at_home(OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {error}") from None
    faults = [f"{where}: a value is required (it is ??? in conf/)" for where in OmegaConf.missing_keys(cfg)]
    try:
        config = schema.model_validate(values | {"composed": values})
    except ValidationError as error:
        faults += [describe(fault, schema, values) for fault in error.errors() if fault["input"] != "???"]
    if faults:
        raise all_faults(faults)
    return config


def _at_home(values: Any) -> Any:
    """`values` with the home folder in the place of a leading `~/`: paths in yaml files."""
    if isinstance(values, dict):
        return {name: _at_home(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_at_home(value) for value in values]
    return str(Path(values).expanduser()) if isinstance(values, str) and values.startswith("~/") else values
