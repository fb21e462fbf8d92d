"""From Hydra's composed yaml to typed settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from secvec.errors import ConfigError
from secvec.runs.content import mapped
from secvec.settings.messages import all_faults, describe

Config = TypeVar("Config", bound=BaseModel)


def load(cfg: DictConfig, schema: type[Config]) -> Config:
    """`cfg` as a `schema`. Raises ConfigError with every fault: what was given, what is allowed, the nearest match."""
    try:
        values: dict[str, Any] = mapped(OmegaConf.to_container(cfg, resolve=True), _at_home)
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


def _at_home(value: Any) -> Any:
    """A path in a yaml file with the home folder in the place of a leading `~/`."""
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value
