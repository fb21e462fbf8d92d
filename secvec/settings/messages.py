"""What is wrong with settings, in the user's words. Imports no torch."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from secvec.errors import ConfigError, nearest

Schema = TypeVar("Schema", bound=BaseModel)


def checked(schema: type[Schema], values: Mapping[str, Any], where: str) -> Schema:
    """`values` as `schema`; raises ConfigError with every fault, each at its place below `where`."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        faults = [describe(fault, schema, (where,)) for fault in error.errors()]
    raise ConfigError("\n".join(["the configuration has these faults:", *(f"  {fault}" for fault in faults)]))


def describe(fault: Any, schema: type[BaseModel], prefix: tuple[str, ...] = ()) -> str:
    """One line for one fault: where, what was given, what is allowed, the nearest match."""
    where = ".".join(
        (*prefix, *(str(part) for part in fault["loc"] if not str(part).startswith(("literal[", "constrained"))))
    )
    given = fault["input"]
    shown = "" if isinstance(given, dict | BaseModel) else f"got {given!r}; "
    if fault["type"] == "extra_forbidden":
        known = known_keys(schema, fault["loc"][:-1])
        return f"{where}: unknown key{nearest(str(fault['loc'][-1]), known)}; known here: {', '.join(sorted(known))}"
    if fault["type"] == "missing":
        return f"{where}: required but not given"
    if fault["type"] == "literal_error":
        allowed = fault["ctx"]["expected"]
        options = re.findall("'([^']*)'", allowed)
        return f"{where}: got {given!r}; allowed: {allowed}{nearest(str(given), options)}"
    if fault["type"] == "value_error":
        return f"{where}: {fault['ctx']['error']}" if where else str(fault["ctx"]["error"])
    return f"{where}: {shown}{fault['msg'][0].lower()}{fault['msg'][1:]}"


def known_keys(schema: type[BaseModel], loc: tuple[int | str, ...]) -> set[str]:
    """Names of the fields that `schema` has at `loc`."""
    for part in loc:
        field = schema.model_fields.get(str(part))
        if field is None:
            continue
        models = [t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        if models:
            schema = models[0]
    return set(schema.model_fields)


def _types(annotation: Any) -> list[Any]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) in (
        typing.Union,
        typing.Annotated,
        list,
    ):
        return [inner for part in get_args(annotation) for inner in _types(part)]
    return [annotation]
