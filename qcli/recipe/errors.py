"""Errors of a recipe in its own words: each with its place, its key and the nearest valid name.

Validators raise them as pydantic's `ValidationError`, and one that is raised inside a validator becomes part of the
error of the record around it. So `Recipe.model_validate` reports everything at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from qcli.recipe.yaml import KeyPath, dotted

_WORDED = "recipe"  # the type of errors whose message is final
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping of keys to values",
    "model": "a mapping of keys to values",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


class Issue(NamedTuple):
    """One error: where in the recipe, and what is wrong."""

    path: KeyPath
    message: str


def issues(error: ValidationError, cls: type[BaseModel], owner: str = "known") -> list[Issue]:
    """What is wrong with the data that `cls` was validated from.

    Args:
        owner: introduces the keys there are, where one is unknown and like none of them.
    """
    problems: list[Issue] = []
    for detail in error.errors(include_url=False):
        path, section = detail["loc"], _section(cls, detail["loc"][:-1])
        message = _words(detail, section, owner)
        if _is_alternative(path, section):
            path = path[:-1]
            if problems and problems[-1].path == path:
                first = problems.pop().message.rpartition(", not ")[0]
                message = f"{first} or {message.removeprefix('must be ')}"
        problems.append(Issue(path, message))
    return problems


def invalid(title: str, problems: Iterable[Issue]) -> ValidationError:
    """Problems as an error that a validator can raise; their paths are relative to what is validated."""
    return ValidationError.from_exception_data(
        title,
        [
            InitErrorDetails(
                type=PydanticCustomError(_WORDED, "{message}", {"message": problem.message}),
                loc=problem.path,
                input=None,
            )
            for problem in problems
        ],
        hide_input=True,
    )


def unknown(kind: str, name: str, known: Sequence[str], owner: str = "known") -> str:
    """`unknown key; did you mean 'bits'?`, or all there are when none is near."""
    near = get_close_matches(name, known, n=1, cutoff=0.7 if kind == "key" else 0.6)
    return f"unknown {kind}; " + (f"did you mean {near[0]!r}?" if near else f"{owner}: {', '.join(known)}")


def _words(detail: Any, section: type[BaseModel], owner: str) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == _WORDED:
        return str(detail["msg"])
    if kind == "extra_forbidden":
        *place, key = detail["loc"]
        inner = _inner_key(section, key)
        return (
            f"unknown key; did you mean {dotted((*place, *inner))!r}?"
            if inner
            else unknown("key", str(key), _keys(section), owner)
        )
    if kind == "missing":
        return "required"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        expected = context["expected"]
        near = get_close_matches(str(value), expected.replace("'", " ").replace(",", " ").split(), n=1)
        return f"must be {expected}, not {_shown(value)}" + (f"; did you mean {near[0]!r}?" if near else "")
    if kind in ("string_too_short", "too_short"):
        return "must not be empty"
    if kind == "string_pattern_mismatch":
        examples = section.model_fields[detail["loc"][-1]].examples or []
        return f"must be written as {' or '.join(map(repr, examples))}, not {_shown(value)}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"must be {words} {context[bound]}, not {_shown(value)}"
    if kind.endswith(("_type", "_parsing", "_from_float")) and kind.partition("_")[0] in _KINDS:
        return f"must be {_KINDS[kind.partition('_')[0]]}, not {_shown(value)}"
    return f"{detail['msg'].replace('Input should be', 'must be')}, not {_shown(value)}"


def _is_alternative(path: KeyPath, section: type[BaseModel]) -> bool:
    """Whether the last part is no key but one of the types of a field, as of `residual: bool | Literal["auto"]`."""
    field = section.model_fields.get(str(path[-2])) if len(path) > 1 else None
    types = get_args(field.annotation) if field and get_origin(field.annotation) in (Union, UnionType) else ()
    return len([type for type in types if type is not NoneType]) > 1


def _keys(section: type[BaseModel]) -> list[str]:
    """The keys that a section is validated from."""
    aliases = {name: field.validation_alias for name, field in section.model_fields.items()}
    return list(dict.fromkeys(alias if isinstance(alias, str) else name for name, alias in aliases.items()))


def _inner_key(section: type[BaseModel], key: str) -> KeyPath:
    """Where a section of this one has a key that was given here, as in `method.bits`; else nothing."""
    for name, field in section.model_fields.items():
        if get_origin(field.annotation) is list:
            continue
        default = field.get_default(call_default_factory=True)
        inner = type(default) if isinstance(default, BaseModel) else _section(section, (name,))
        if inner is not section and key in inner.model_fields:
            return (field.validation_alias if isinstance(field.validation_alias, str) else name, key)
    return ()


def _section(cls: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel]:
    """The class of the mapping at `loc` of `cls`."""
    for part in loc:
        if isinstance(part, str) and part in cls.model_fields:
            annotation = cls.model_fields[part].annotation
            models = (t for t in (annotation, *get_args(annotation)) if isinstance(t, type))
            cls = next((t for t in models if issubclass(t, BaseModel)), cls)
    return cls


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
