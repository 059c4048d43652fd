"""Methods and transforms from plain data, by their registered names, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from qcli.algorithms.method import Method
from qcli.algorithms.transform import Transform
from qcli.recipe.allocation import without_allocation
from qcli.recipe.errors import Issue, invalid, issues, unknown
from qcli.utils import registry

METHODS, TRANSFORMS, EXPORTS = "qcli.algorithms.methods", "qcli.algorithms.transforms", "qcli.export.targets"
DEFAULT_METHOD = "gptq-like"


def build_method(options: Mapping[str, Any]) -> Method:
    """The method that `name` (default: gptq-like) and its options describe.

    Raises:
        ValidationError: an unknown name, unknown or invalid options; in a recipe's words.
    """
    method: Method = _build("method", METHODS, {"name": DEFAULT_METHOD} | dict(options))
    return method


def method_from(given: Any) -> Method:
    """A recipe's method: an instance, or plain data, of which the allocation's options are not the method's.

    Raises:
        ValidationError: as `build_method`.
    """
    if isinstance(given, Method):
        return given
    if not isinstance(given, Mapping):
        raise invalid("Method", [Issue((), "must be a mapping of keys to values, as {name: rtn, bits: 4}")])
    return build_method(without_allocation(given))


def transform_from(given: Any) -> Transform:
    """One of a recipe's transforms: an instance, a name, or plain data.

    Raises:
        ValidationError: as `build_method`.
    """
    if isinstance(given, Transform):
        return given
    options = {"name": given} if isinstance(given, str) else given
    if not isinstance(options, Mapping) or "name" not in options:
        raise invalid("Transform", [Issue((), "must be a name, or a mapping as {name: teq, steps: 200}")])
    transform: Transform = _build("transform", TRANSFORMS, options)
    return transform


def named_options(plugin: Method | Transform) -> dict[str, Any]:
    """A method or transform as plain data, from which it can be built again."""
    return {"name": plugin.name, **plugin.model_dump(mode="json")}


def _build(kind: str, package: str, options: Mapping[str, Any]) -> Any:
    name, known = options["name"], registry.names(package)
    if name not in known:
        raise invalid(kind, [Issue(("name",), unknown(f"{kind} {name!r}", str(name), known))])
    cls: type[BaseModel] = registry.load(package, name)
    try:
        return cls.model_validate({key: value for key, value in options.items() if key != "name"})
    except ValidationError as error:
        raise invalid(kind, issues(error, cls, owner=f"{kind} {name!r} has")) from None
