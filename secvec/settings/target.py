"""A class of a library that a yaml names by `_target_`, with its keyword arguments."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterable
from typing import Any, ClassVar

from pydantic import ConfigDict, Field, model_validator

from secvec.errors import nearest
from secvec.settings.schema import Settings


class Target(Settings):
    """A class and its keyword arguments, as for Hydra's `instantiate`: `_target_` and any others.

    A `_target_` that is no `base`, and arguments that the class does not take, are refused with the nearest match.
    """

    model_config = ConfigDict(extra="allow", serialize_by_alias=True)
    base: ClassVar[str]
    """Full name of the class that `_target_` must derive from."""
    ours: ClassVar[Collection[str]] = ()
    """Arguments that this program gives."""

    target: str = Field(alias="_target_")

    @model_validator(mode="after")
    def _can_be_called(self) -> Target:
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
        raise ValueError(f"{name} takes no {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
