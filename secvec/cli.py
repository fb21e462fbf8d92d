"""Around Hydra: what is wrong in one message with exit code 2, and no traceback for what a user can mend."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.utils import get_args
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from secvec.config.resolvers import register_resolvers
from secvec.errors import SecVecError, nearest

USER_ERROR = 2


def exit_code(main: Callable[[], None], config_name: str) -> int:
    """Runs a `@hydra.main` function: 0; after a message 2 for a user's mistake, 1 for another error, 130 for Ctrl-C."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting on its own
    register_resolvers()
    try:
        main()
        if _stopped:
            return _complain(str(_stopped[0]), _stopped[0].exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        return _complain(_composition_faults(config_name, error), USER_ERROR)
    except SecVecError as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted; the same command goes on from the last whole epoch, batch or job", 130)
    except Exception as error:
        if _started:
            traceback.print_exc()
            return 1
        if isinstance(error, OSError) and error.filename:  # Hydra makes the folder of a multirun
            return _complain(f"{error.filename}: {error.strerror}", USER_ERROR)
        # some of Hydra's complaints about an override are plain ValueErrors
        return _complain(_composition_faults(config_name, error), USER_ERROR)
    return 0


_stopped: list[SecVecError] = []
_started: list[bool] = []


def started() -> None:
    """Says that the configuration is composed: what fails from here on is not its fault."""
    _started.append(True)


def for_people(task: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Keeps a SecVecError of a single run from Hydra, which would add lines of its own to the message."""

    @wraps(task)
    def run(cfg: DictConfig) -> None:
        started()
        try:
            task(cfg)
        except SecVecError as error:
            _leave_no_empty_folder()
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # a launcher must see that its job failed
            _stopped.append(error)

    return run


def overrides() -> list[str]:
    """What was given on the command line, for the record."""
    return list(HydraConfig.get().overrides.task)


def _complain(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def _leave_no_empty_folder() -> None:
    """Hydra makes the run folder before the settings are checked; a wrong setting should leave none."""
    if HydraConfig.initialized():
        with suppress(OSError):
            Path(HydraConfig.get().runtime.output_dir).rmdir()


def _composition_faults(config_name: str, error: Exception) -> str:
    """Every override that does not compose, each with what is known there; Hydra itself stops at the first."""
    flags = get_args()
    GlobalHydra.instance().clear()
    faults: list[str] = []
    with initialize_config_dir(str(Path(sys.argv[0]).resolve().parent / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        parser, parsed = OverridesParser.create(config_loader=loader), []
        for text in flags.overrides:
            try:
                parsed.append(parser.parse_override(text))
            except HydraException as bad:
                faults.append(f"{text}: not of the form key=value ({str(bad).splitlines()[0]})")
        search = [o for o in parsed if o.key_or_group == "hydra.searchpath"]
        places = [str(place) for o in search for place in cast(list[str], o.value())] + [flags.config_dir] * bool(
            flags.config_dir
        )
        _look_in(loader, places)
        extra = [o.input_line or "" for o in search]
        parsed = [o for o in parsed if o not in search]
        for override in [o for o in parsed if o.value() is None and _is_group(loader, o)]:
            faults.append(f"{override.input_line}: this group needs a choice; leave it out to take the default")
            parsed.remove(override)
        chosen = [o for o in parsed if o.value() is not None and _is_group(loader, o)]
        groups = []
        for override in chosen:
            for text in _single_values(override):
                options = _choices(loader, override.key_or_group)
                value = text.partition("=")[2]
                if value in options:
                    groups.append(text)
                else:
                    faults.append(f"{text}: no such choice{nearest(value, options)}; allowed: {', '.join(options)}")
        for override in (o for o in parsed if o not in chosen):
            text = _single_values(override)[0]
            try:
                compose(config_name, [*extra, *_last(groups), text], return_hydra_config=True)
            except (HydraException, OmegaConfBaseException):
                faults.append(_unknown_key(config_name, override, loader))
        if not faults:
            try:
                compose(config_name, [*extra, *_last(groups)])
            except (HydraException, OmegaConfBaseException) as bad:
                faults.append(_plain(bad))
    return "\n".join(["the configuration cannot be composed:", *(f"  {fault}" for fault in faults or [_plain(error)])])


def _look_in(loader: Any, places: list[str]) -> None:
    """Lets `loader` find the choices in the user's own config folders too."""
    path = loader.get_search_path()
    for place in places:
        path.prepend("command-line", place if "://" in place else f"file://{Path(place).resolve()}")
    loader.repository = ConfigRepository(config_search_path=path)


def _is_group(loader: ConfigLoader, override: Override) -> bool:
    return override.key_or_group in _all_groups(loader)


def _all_groups(loader: ConfigLoader) -> set[str]:
    return set(loader.list_groups("")) - {"hydra"} | {"hydra/launcher", "hydra/sweeper"}


def _choices(loader: ConfigLoader, group: str) -> list[str]:
    """What a group can be set to; choices in a folder of it are named `folder/choice`."""
    nested = [(name, _choices(loader, f"{group}/{name}")) for name in loader.list_groups(group)]
    return [*loader.get_group_options(group), *(f"{folder}/{name}" for folder, names in nested for name in names)]


def _single_values(override: Override) -> list[str]:
    """`key=value` for each value of a sweep, or the override itself."""
    if override.is_sweep_override():
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    return [override.input_line or ""]


def _last(groups: list[str]) -> list[str]:
    return list({text.partition("=")[0]: text for text in groups}.values())


def _unknown_key(config_name: str, override: Override, loader: ConfigLoader) -> str:
    config = compose(config_name, return_hydra_config=True)
    *path, key = override.key_or_group.split(".")
    node = OmegaConf.select(config, ".".join(path)) if path else config
    if not isinstance(node, DictConfig):
        if path and OmegaConf.select(config, path[0]) is not None:
            return f"{override.input_line}: {'.'.join(path)!r} is a single value and has nothing below it"
        known = [str(k) for k in config] + sorted(_all_groups(loader))
        return f"{override.input_line}: there is no {'.'.join(path)!r}{nearest(path[0], known)}"
    known = [str(k) for k in node] + ([] if path else sorted(_all_groups(loader)))
    return f"{override.input_line}: unknown key{nearest(key, known)}; known here: {', '.join(sorted(set(known)))}"


def _plain(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()
