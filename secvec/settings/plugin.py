"""Settings that a yaml file makes by `_target_`: behaviors, judges, streams of data, defenses. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, GetCoreSchemaHandler, SerializeAsAny, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

Kind = TypeVar("Kind")


class _FromTarget:
    """Lets a field take a mapping with a `_target_`, the import path of a class, in place of an object of its type."""

    def __get_pydantic_core_schema__(self, kind: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def build(value: Any) -> Any:
            if not isinstance(value, Mapping):
                return value
            settings = {key: item for key, item in value.items() if key != "_target_"}
            return target_class(value, kind).model_validate(settings)

        return core_schema.no_info_before_validator_function(build, handler(kind))


Plugin = Annotated[Kind, SerializeAsAny(), _FromTarget()]
"""`Plugin[Behavior]`: a Behavior, or the mapping whose `_target_` names a subclass and which holds its settings."""


def target_class(settings: Mapping[str, Any], kind: Any) -> Any:
    """The subclass of `kind` that `settings["_target_"]` names; raises ValidationError."""
    if "_target_" not in settings:
        raise _fault("missing", settings)
    target = str(settings["_target_"])
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        reason = PydanticCustomError("import", "cannot be imported: {error}", {"error": str(error)})
        raise _fault(reason, target) from None
    if not (isinstance(found, type) and issubclass(found, kind)):
        wanted = {"name": kind.__name__, "path": f"{kind.__module__}.{kind.__name__}"}
        raise _fault(PydanticCustomError("kind", "this is no {name}; name a subclass of {path}", wanted), target)
    return found


def _fault(reason: str | PydanticCustomError, given: Any) -> ValidationError:
    return ValidationError.from_exception_data("", [InitErrorDetails(type=reason, loc=("_target_",), input=given)])


def to_target(plugin: BaseModel) -> dict[str, Any]:
    """The mapping from which a `Plugin` field makes `plugin` again."""
    kind = type(plugin)
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **plugin.model_dump(mode="json")}
