"""The configuration: yaml files in `conf/`, composed by Hydra, checked by typed settings."""

from pathlib import Path

import secvec

_PACKAGE = Path(secvec.__file__).parent
CONF = next((folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir()), _PACKAGE / "conf")
"""The yaml files: inside the installed package, beside it in the repository."""
