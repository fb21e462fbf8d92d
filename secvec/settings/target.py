"""What a yaml names by `_target_`: our plug-ins with their settings, and classes of libraries. Imports no torch."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, Field, GetCoreSchemaHandler, SerializeAsAny, ValidationError, model_validator
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from secvec.errors import nearest
from secvec.settings.conf import shipped
from secvec.settings.schema import Settings

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


class Target(Settings, extra="allow", serialize_by_alias=True):
    """A class and its keyword arguments, as for Hydra's `instantiate`: `_target_` and any others.

    A `_target_` that is no `base`, and arguments that the class does not take, are refused with the nearest match.
    """

    base: ClassVar[str]
    """Full name of the class that `_target_` must derive from."""
    ours: ClassVar[Collection[str]] = ()
    """Arguments that this program gives."""
    group: ClassVar[str] = ""
    """The group of conf/ whose classes and arguments are known to be right."""

    target: str = Field(alias="_target_")

    @model_validator(mode="after")
    def _can_be_called(self) -> Target:
        given = set(self.model_extra or {})
        if any(self.target == known.get("_target_") and given <= known.keys() for known in shipped(self.group)):
            return self
        called, base = imported(self.target), imported(self.base)
        if not (isinstance(called, type) and issubclass(called, base)):
            raise ValueError(f"_target_: {self.target} is no {self.base}")
        check_arguments(self.target, called, self.model_extra or {}, self.ours)
        return self

    def build(self, *args: Any, **more: Any) -> Any:
        """A new object: the class called with `args`, the arguments of the yaml, and `more`."""
        return imported(self.target)(*args, **{k: built(v) for k, v in (self.model_extra or {}).items()}, **more)


def imported(name: str) -> Any:
    """What has the full name `name`; raises ValueError if there is none."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {name!r}: {error}") from None


def built(value: Any) -> Any:
    """`value` with the object in place of each mapping with a `_target_`, also inside a list."""
    if isinstance(value, list):
        return [built(item) for item in value]
    if isinstance(value, dict) and "_target_" in value:
        called, arguments = imported(value["_target_"]), {k: built(v) for k, v in value.items() if k != "_target_"}
        check_arguments(value["_target_"], called, arguments)
        return called(**arguments)
    return value


def check_arguments(name: str, called: Callable, given: Iterable[str], ours: Collection[str] = ()) -> None:
    """Raises ValueError for names in `given` that `called` does not take, or that are `ours` to give."""
    parameters = inspect.signature(called).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [parameter for parameter in parameters if parameter not in ours]
    if unknown := [f"{argument!r}{nearest(argument, known)}" for argument in given if argument not in known]:
        raise ValueError(
            f"{name} takes no {', '.join(unknown)}; it takes {', '.join(sorted(known))}. To leave out one of the yaml: "
            "~GROUP.NAME, as in ~optimizer.betas"
        )
