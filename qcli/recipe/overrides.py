"""What overrides make of a recipe's method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from qcli.algorithms.method import Method
from qcli.recipe.errors import Issue, issues
from qcli.recipe.plugins import DEFAULT_METHOD, METHODS, build_method
from qcli.recipe.sections import Override
from qcli.utils import registry


def overridden(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method with those that an override changes.

    A method of another name inherits only options that both have from common classes: elsewhere the same name may mean
    something else.
    """
    known = registry.names(METHODS)
    old = base.get("name", DEFAULT_METHOD)
    new = changes.get("name", old)
    if new != old and new in known and old in known:
        ours, theirs = registry.load(METHODS, new), registry.load(METHODS, old)
        common = [cls for cls in ours.__mro__ if issubclass(theirs, cls) and issubclass(cls, BaseModel)]
        base = {key: value for key, value in base.items() if any(key in cls.model_fields for cls in common)}
    return {**base, **changes, "name": new}


def override_problems(base: Mapping[str, Any] | None, overrides: Any) -> list[Issue]:
    """What is wrong with the methods that overrides come to.

    Args:
        base: options of the recipe's method; None: unknown, so overrides that name no method cannot be checked.
        overrides: records or plain data; what is neither is somebody else's error.
    """
    problems = []
    for i, rule in enumerate(overrides if isinstance(overrides, list) else []):
        changes = rule.method if isinstance(rule, Override) else rule.get("method") if isinstance(rule, dict) else None
        if not isinstance(changes, dict) or (base is None and "name" not in changes):
            continue
        try:
            build_method(overridden(base or {}, changes))
        except ValidationError as error:
            path = ("overrides", i, "method")
            problems += [Issue((*path, *issue.path), issue.message) for issue in issues(error, Method)]
    return problems


def name_alone(method: Any) -> dict[str, str] | None:
    """The options of a recipe's method as far as overrides may rely on them where the recipe is invalid: its name."""
    if isinstance(method, Method):
        return {"name": method.name}
    name = (method or {}).get("name", DEFAULT_METHOD) if method is None or isinstance(method, dict) else None
    return {"name": name} if name in registry.names(METHODS) else None
