"""The commands: train.py and `secvec-train`, evaluate.py and `secvec-evaluate`. Wrong settings are one message."""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from secvec.config.resolvers import register_resolvers
from secvec.errors import SecVecError, nearest, one_line
from secvec.settings.conf import CONF
from secvec.settings.messages import renamed
from secvec.settings.trainer import OURS

USER_ERROR = 2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
OF_THE_DISK = (*NO_ROOM, errno.EACCES, errno.EPERM)
"""A disk that is full or may not be written: that the user can fix."""
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)


def train() -> int:
    """The command train.py, installed as `secvec-train`. Returns the exit code."""
    return run_command("train", lambda cfg: _start("train", cfg))


def evaluate() -> int:
    """The command evaluate.py, installed as `secvec-evaluate`. Returns the exit code."""
    return run_command("evaluate", lambda cfg: _start("evaluate", cfg))


def _start(command: str, cfg: DictConfig) -> None:
    """Calls the function of `secvec.run` that has the name of the command, once the settings are right."""
    from secvec.config import schema
    from secvec.config.load import load

    config = load(cfg, schema.RunConfig if command == "train" else schema.EvaluateConfig)
    from secvec import run  # slow to import, so after wrong settings are refused

    getattr(run, command)(config, list(HydraConfig.get().overrides.task))


def run_command(config_name: str, task: Callable[[DictConfig], None]) -> int:
    """Runs `task` with conf/`config_name`.yaml and the command line, once or as a multirun. Returns the exit code."""
    errors: list[tuple[Exception, DictConfig]] = []

    @wraps(task)
    def job(cfg: DictConfig) -> None:
        try:
            task(cfg)
        except Exception as error:
            with suppress(OSError):  # Hydra makes the run folder before the settings are checked
                Path(HydraConfig.get().runtime.output_dir).rmdir()
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # Hydra's own launchers must see that the job failed
            composed = DictConfig({"hydra": HydraConfig.get()}, flags={"readonly": True})
            errors.append((error, composed))  # raised below: Hydra would print lines of its own

    def main() -> None:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
        for error, composed in errors:
            HydraConfig.instance().set_config(composed)  # the configuration is composed: see report_user_errors
            raise error

    return report_user_errors(main, config_name)


def report_user_errors(main: Callable[[], None], config_name: str) -> int:
    """Calls `main`, which runs Hydra. Prints what the user can fix as one message without a traceback.

    Returns the exit code: 0; 2 for a mistake of the user, 1 for another error, 130 for Ctrl-C.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them and exiting
    register_resolvers()
    # shells leave the ~ of key=~/folder, and Hydra cannot read it
    sys.argv[1:] = [re.sub(r"""(?<=[=,['"])~(?=/)""", lambda _: str(Path.home()), word) for word in sys.argv[1:]]
    try:
        main()
        return 0
    except SecVecError as error:
        message, code = str(error), error.exit_code
    except KeyboardInterrupt:
        message, code = "interrupted; the same command goes on from the last checkpoint, batch or job", 130
    except Exception as error:
        started, cause = HydraConfig.initialized(), _no_room(error) or error
        if isinstance(cause, OSError) and (cause.errno in OF_THE_DISK or (cause.filename and not started)):
            where = f"{cause.filename}: " if cause.filename else ""
            then = "; fix this, and the same command continues from what is finished" if started else ""
            message, code = f"{where}{cause.strerror}{then}", USER_ERROR
        elif started and not isinstance(error, HydraException | OmegaConfBaseException):
            traceback.print_exc()
            return 1
        else:
            faults = _composition_faults(config_name) or [one_line(str(error) or error.__cause__)]
            message = "\n  ".join(["the configuration cannot be composed:", *faults])
            code = USER_ERROR
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def _no_room(error: BaseException) -> OSError | None:
    """The full disk behind another error: torch raises its own on top, safetensors and torch's shards put it in words.

    None: it is something else.
    """
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return error
    for number in map(int, re.findall(r"(?:os error |\[Errno )(\d+)", str(error))):
        if number in NO_ROOM:
            return OSError(number, os.strerror(number))
    before = error.__cause__ or error.__context__
    return _no_room(before) if before else None


def _composition_faults(config_name: str) -> list[str]:
    """One line for each override that does not compose; Hydra itself stops at the first."""
    args, parser, faults, overrides = get_args(), OverridesParser.create(), list[str](), list[Override]()
    for text in args.overrides:
        try:
            overrides.append(parser.parse_override(text))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            faults.append(f"{text}: not of the form key=value ({reason}){_quoted(text)}")
    GlobalHydra.instance().clear()
    root = args.config_name or config_name
    folders = [CONF]
    if args.config_dir:
        own = Path(args.config_dir).resolve()
        # a config.yaml of a run is whole, and lies in that folder itself
        folders = [own, CONF] if (own / f"{root}.yaml").is_file() else [CONF, own]
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for other in folders[1:]:
            loader.get_search_path().prepend("command-line", f"file://{other}", SearchPathQuery(provider="schema"))
        # with an override of the search path, Hydra reads the folders again, that of --config-dir among them
        given = [override.input_line or "" for override in overrides if override.key_or_group == "hydra.searchpath"]
        given += ["hydra.searchpath=[]"]
        groups = {*loader.list_groups(""), "hydra/launcher", "hydra/sweeper"} - {"hydra"}
        rest = [override for override in overrides if override.key_or_group != "hydra.searchpath"]
        for override in sorted(rest, key=lambda override: override.key_or_group not in groups):  # choices bring keys
            name, composed = override.key_or_group, ""
            for text in _single_values(override, every=name in groups):
                try:
                    compose(root, [*given, text], return_hydra_config=True)
                    composed = text
                except COMPOSITION_ERRORS as error:
                    if name in groups:
                        reason = _unknown_choice(loader, name, text, given)
                    else:
                        text, config = override.input_line or "", _composed(root, given)
                        reason = _unknown_key(config, name, groups) if config else ""
                    told = renamed(text if name in groups else name)
                    faults.append(f"{text}: {told.lstrip('; ') or reason or one_line(str(error) or error.__cause__)}")
            given += [composed] if composed else []
        swept = {override.key_or_group for override in rest if override.is_sweep_override()} & groups
        of_swept = [(o.input_line, o.key_or_group.split(".")[0]) for o in rest if o.key_or_group not in groups]
        return faults or [f"{text}: {_swept(group)}" for text, group in of_swept if group in swept]


def _swept(group: str) -> str:
    """Why a setting of one choice is unknown, where the sweep chooses among several."""
    return f"{group} is swept, and its settings are read before one is chosen: give {group}=NAME, one command for each"


def _quoted(text: str) -> str:
    """How to type a text that Hydra reads only in quotes, a path with brackets for example; empty: it is none.

    There are two pairs of quotes, of which the shell takes one away.
    """
    key, given, value = text.partition("=")
    quoted = key + "='" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if not given or value[:1] in ("", "[", "{", "'", '"'):
        return ""
    with suppress(HydraException):
        OverridesParser.create().parse_override(quoted)
        typed = shlex.quote(quoted) if set(quoted) & set('"$`\\!') else f'"{quoted}"'
        return f"; a text with such characters needs quotes, type {typed}"
    return ""


def _composed(config_name: str, overrides: list[str]) -> DictConfig:
    """The composed config; empty where there is none."""
    with suppress(*COMPOSITION_ERRORS):
        return compose(config_name, overrides, return_hydra_config=True)
    return DictConfig({})


def _single_values(override: Override, every: bool) -> list[str]:
    """`key=value` for the first or for every value of a sweep, or the override itself; nothing for an interval."""
    if override.is_discrete_sweep():
        values = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        return values if every else values[:1]
    return [] if override.is_sweep_override() else [override.input_line or ""]


def _unknown_choice(loader: ConfigLoader, group: str, text: str, given: list[str]) -> str:
    """What `group` offers instead; empty where it has the choice, and something else is wrong."""

    def choices(group: str) -> list[str]:
        nested = [(name, choices(f"{group}/{name}")) for name in loader.list_groups(group)]
        found = loader.get_group_options(group, config_name=None, overrides=given[:1])
        return [*found, *(f"{name}/{choice}" for name, below in nested for choice in below)]

    known = choices(group)
    wrong = [choice for choice in text.partition("=")[2].strip("[]").split(",") if choice not in known]
    return f"no such choice{nearest(wrong[0], known)}; allowed: {', '.join(known)}" if wrong else ""


def _unknown_key(config: DictConfig, name: str, groups: set[str]) -> str:
    """What is known in the place of the key `name`; empty where the key is known, and something else is wrong."""
    *path, key = name.split(".")
    node = OmegaConf.select(config, ".".join(path)) if path else config
    if isinstance(node, DictConfig):
        known = {str(k) for k in node} | (set() if path else groups)
        if key in known:
            return ""
        if path == ["trainer"] and key in OURS:
            return f"cannot be set: {OURS[key]}"
        swept = path and path[0] in (OmegaConf.select(config, "hydra.sweeper.params") or {})
        told = f". {_swept(path[0])}" if swept else ""
        return f"unknown key{nearest(key, known)}; known here: {', '.join(sorted(known))}{told}"
    if path and OmegaConf.select(config, path[0]) is not None:
        return f"{'.'.join(path)!r} is a single value and has nothing below it"
    return f"there is no {'.'.join(path)!r}{nearest(path[0], [*map(str, config), *groups])}"
