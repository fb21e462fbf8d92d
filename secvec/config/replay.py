"""The config.yaml of a run folder: a main config that composes to the same run again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from secvec.runs.content import mapped

HEADER = """\
# This run again, or with other values: `{command} --config-dir THIS_FOLDER --config-name config [key=value]`.
# Everything is resolved. The key, the run folder and the settings of Hydra are those of conf/common.yaml.
defaults:
  - common
  - _self_

"""


def replay_yaml(config: Mapping[str, Any]) -> str:
    """`config`, composed and resolved, as a main config with the same key. `force` and `plan` are not kept."""
    kept = {name: value for name, value in config.items() if name not in ("key", "run_dir")}
    kept |= {name: value for name, value in {"force": False, "plan": None}.items() if name in kept}
    command = "python train.py" if "stage" in kept else "python evaluate.py"
    return HEADER.format(command=command) + OmegaConf.to_yaml(OmegaConf.create(mapped(kept, _escaped)))


def _escaped(value: Any) -> Any:
    """A text with every `${` escaped: it is resolved, and must not be once more."""
    return value.replace("${", "\\${") if isinstance(value, str) else value
