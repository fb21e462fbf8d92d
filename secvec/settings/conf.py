"""The yaml files of the package. Their values are known to be right: no library is imported to check them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

import secvec

_PACKAGE = Path(secvec.__file__).parent
CONF = next((folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir()), _PACKAGE / "conf")
"""The yaml files: inside the installed package, beside it in the repository."""


@cache
def shipped(group: str) -> list[dict[str, Any]]:
    """The values in each yaml file of a group, not resolved."""
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((CONF / group).glob("*.yaml"))]
