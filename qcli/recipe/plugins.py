"""Methods, transforms and other sections of a recipe from plain data, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from qcli.algorithms.method import Method
from qcli.algorithms.transform import Transform
from qcli.utils import registry

Model = TypeVar("Model", bound=BaseModel)
METHODS, TRANSFORMS, EXPORTS = "qcli.algorithms.methods", "qcli.algorithms.transforms", "qcli.export.targets"
DEFAULT_METHOD = "gptq-like"


def build_method(fields: Mapping[str, Any]) -> Method:
    """The method that `name` and its options describe.

    Raises:
        UsageError: unknown name.
        ValidationError: unknown or invalid options.
    """
    options = dict(fields)
    cls: type[Method] = registry.load(METHODS, options.pop("name", DEFAULT_METHOD))
    return strictly(cls, options)


def named_fields(plugin: Method | Transform) -> dict[str, Any]:
    """A method or transform as plain data, as it stands in a recipe."""
    return {"name": plugin.name, **plugin.model_dump(mode="json")}


def derived(base: Mapping[str, Any], partial: Mapping[str, Any]) -> dict[str, Any]:
    """`partial`, and what it leaves unsaid from `base`.

    Of another method only the options that both have from common classes are taken over: an option of the
    same name may mean something else.
    """
    known = registry.names(METHODS)
    old, new = base.get("name", DEFAULT_METHOD), partial.get("name", base.get("name", DEFAULT_METHOD))
    if new != old and new in known and old in known:
        ours, theirs = registry.load(METHODS, new), registry.load(METHODS, old)
        common = [cls for cls in ours.__mro__ if issubclass(theirs, cls) and issubclass(cls, BaseModel)]
        base = {key: value for key, value in base.items() if any(key in cls.model_fields for cls in common)}
    return {**base, **partial, "name": new}


def strictly(cls: type[Model], data: Mapping[str, Any]) -> Model:
    """Validate as strict JSON: text is not a number, 1 is not true, but a list may become a tuple."""
    return cls.model_validate_json(json.dumps(data), strict=True)
