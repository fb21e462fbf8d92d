"""Error messages for settings: what was given, what is allowed, the nearest match, the new name. Imports no torch."""

import re
import typing
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from secvec.errors import ConfigError, nearest
from secvec.settings.target import target_class

Schema = TypeVar("Schema", bound=BaseModel)

RENAMED = {
    "data.benign.[0-9]*": "data.benign.NAME",
    "data.weights.[0-9]*": "data.weights.NAME",
    "data.benign=[[][]]": "~data.benign",
    "data.benign.*.choices": "an item by its number, {{ [a, b][label] }}, in prompt and response",
    "behavior.choices": "an item by its number, {{ [a, b][label] }}, in prompt and response",
    "defense.dropout": "vector.keep_dropout",
    "defense=sv_dropout": "vector=dropout",
    "defense=sv_no_kl": "vector=no_kl",
    "defense=sv_prompt_loss": "vector=prompt_loss",
    "defense=sv_attack_data": "vector=attack_data",
    "defense=sv_retest": "vector=retest",
    "finetune.refit_vector": "defense=refitted_vector",
    "hydra/sweeper=optuna": "hydra/sweeper=search",
    "trainer.num_threads": "num_threads",
    **{f"logger.{name}": f"logger.wandb.{name}" for name in ("project", "entity", "offline", "upload_vector")},
    "logger.num_predictions": "logger.wandb.num_predictions, or that of logger.tensorboard",
}
"""Old settings (as patterns: `*` is any text) and choices, and what took their place."""


def renamed(given: str) -> str:
    """`; OLD is now NEW` for an old key, a key below one, or an old `group=choice`; else nothing."""
    for old, new in RENAMED.items():
        start = ".".join(given.split(".")[: old.count(".") + 1])
        if fnmatch(start, old):
            return f"; {start} is now {new}"
    return ""


def all_faults(faults: Iterable[str]) -> ConfigError:
    """One error that lists `faults`."""
    return ConfigError("\n".join(["the configuration has these errors:", *(f"  {fault}" for fault in faults)]))


def checked(schema: type[Schema], values: Mapping[str, Any] | BaseModel, where: str) -> Schema:
    """`values` as a `schema`. Raises ConfigError with every fault, each named by its key below `where`."""
    try:
        return schema.model_validate(values if isinstance(values, BaseModel) else dict(values))
    except ValidationError as error:
        raise all_faults(describe(fault, schema, values, (where,)) for fault in error.errors()) from None


def describe(fault: Any, schema: type[BaseModel], values: Any, prefix: tuple[str, ...] = ()) -> str:
    """One line about a fault that pydantic found in `values`: where, what was given, what is allowed."""
    loc = [str(part) for part in fault["loc"] if not str(part).startswith(("literal[", "constrained"))]
    where, given, kind = ".".join((*prefix, *loc)), fault["input"], fault["type"]
    if kind == "extra_forbidden":
        known = known_keys(schema, values, loc[:-1])
        hint = renamed(where) or nearest(loc[-1], known)
        return f"{where}: unknown key{hint}; known here: {', '.join(sorted(known))}"
    if kind == "missing":
        return f"{where}: required but not given{renamed(where)}"
    if kind == "literal_error":
        allowed = fault["ctx"]["expected"]
        hint = nearest(str(given), re.findall("'([^']*)'", allowed))
        return f"{where}: got {given!r}; allowed: {allowed}{hint}"
    if kind == "value_error":
        return f"{where}: {fault['ctx']['error']}".removeprefix(": ")
    shown = "" if isinstance(given, dict | BaseModel) else f"got {given!r}; "
    hint = renamed(f"{where}.0") if isinstance(given, list) else ""
    return f"{where}: {shown}{fault['msg'][0].lower()}{fault['msg'][1:]}{hint}"


def known_keys(schema: type[BaseModel], values: Any, loc: Iterable[str]) -> set[str]:
    """Names of the settings at `loc`. A plug-in's class is the one that the `_target_` in `values` names."""
    for part in loc:
        values = values.get(part) if isinstance(values, Mapping) else None  # lists hold no plug-ins
        if isinstance(values, Mapping) and "_target_" in values:
            schema = target_class(values, BaseModel)
        elif field := schema.model_fields.get(part):
            schema = next(_models(field.annotation), schema)
    return set(schema.model_fields)


def _models(annotation: Any) -> typing.Iterator[type[BaseModel]]:
    """The settings classes that a type hint names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
