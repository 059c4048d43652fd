"""Texts in recipes: a name, a mapping, or a list of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ValidationError

from qcli.data.source import Data, TextSource, WeightedText
from qcli.recipe.errors import Issue, invalid, issues
from qcli.recipe.yaml import dotted, read_yaml
from qcli.utils.errors import UsageError
from qcli.utils.paths import expanded

Source = TypeVar("Source", bound=TextSource)


def text_from(given: Any) -> Data:
    """A text of a recipe.

    Raises:
        ValidationError: not a name, or unknown or invalid keys.
    """
    return tuple(_parts(given)) if isinstance(given, list | tuple) else single_text_from(given)


def single_text_from(given: Any) -> str | TextSource:
    """A text that is no mixture.

    Raises:
        ValidationError: as `text_from`.
    """
    if isinstance(given, TextSource):
        return given
    if isinstance(given, str):
        if not given:
            raise invalid("Text", [Issue((), "must not be empty")])
        return expanded(given)
    return _source(TextSource, given)


def text_of_flag(given: str) -> str | TextSource:
    """A text as `--data` names it: a name or a path, or a mapping in YAML.

    Raises:
        UsageError: everything that is wrong with it, a line each.
    """
    if not given.startswith("{"):
        return given
    document = read_yaml(given, "--data")
    if document.problems:
        raise UsageError(*(f"--data: {problem.message}" for problem in document.problems))
    try:
        return single_text_from(document.data)
    except ValidationError as error:
        lines = (f"--data: {dotted(issue.path)}: {issue.message}" for issue in issues(error, TextSource))
        raise UsageError(*lines) from None


def _parts(given: list[Any] | tuple[Any, ...]) -> list[WeightedText]:
    sources, problems = list[WeightedText](), list[Issue]()
    for index, each in enumerate(given):
        if isinstance(each, WeightedText):
            sources.append(each)
            continue
        try:
            sources.append(_source(WeightedText, {"path": each} if isinstance(each, str) else each))
        except ValidationError as error:
            problems += [Issue((index, *problem.path), problem.message) for problem in issues(error, WeightedText)]
    if not given:
        problems.append(Issue((), "must not be empty"))
    if problems:
        raise invalid("Text", problems)
    return sources


def _source(cls: type[Source], given: Any) -> Source:
    if not isinstance(given, Mapping):
        raise invalid("Text", [Issue((), "must be a name or a path, or a mapping as {path: a.csv, column: body}")])
    try:
        return cls.model_validate(dict(given))
    except ValidationError as error:
        raise invalid("Text", issues(error, cls)) from None


AnyText = Annotated[Data, BeforeValidator(text_from)]
SingleText = Annotated[str | TextSource, BeforeValidator(single_text_from)]
