"""What a recipe says of a text: its name or path alone, a mapping that says more, or several of them by weight."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from qcli.data.rows import is_known
from qcli.utils.options import Options, Place

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class TextSource(Options):
    """Where text is, and how its rows become text."""

    path: Place = Field(min_length=1, description="a file, the name of a data set, or `org/name` of one on the hub")
    config: str | None = Field(default=None, min_length=1, description="configuration of a data set on the hub")
    split: str | None = Field(
        default=None,
        min_length=1,
        examples=["train[:5000]"],
        description="part of a data set on the hub, as train[:5000]; default: train, for evaluation test or validation",
    )
    column: str | None = Field(
        default=None,
        min_length=1,
        description="the column with the text, or with a list of messages; default: text, messages, conversations, "
        "prompt and completion, or instruction and output, whichever there is",
    )
    template: str | None = Field(
        default=None,
        min_length=1,
        examples=["{question} {answer}"],
        description="makes text of several columns: their names in braces, as {question} {answer}",
    )

    @model_validator(mode="after")
    def _one_way(self) -> TextSource:
        if self.column is not None and self.template is not None:
            raise ValueError("column and template are two ways to make text of a row: choose one")
        if self.template is not None and not template_columns(self.template):
            raise ValueError("template names no column: write {name} where its text goes")
        if (self.config is not None or self.split is not None) and not is_hub(self.path):
            raise ValueError("config and split are of data sets on the hub, named org/name")
        return self

    def __str__(self) -> str:
        """What it is called in results."""
        more = [f"{name} {value}" for name in ("config", "split", "column") if (value := getattr(self, name))]
        return ", ".join([self.path, *more, *(["template"] if self.template else [])])


class WeightedText(TextSource):
    """One of several texts."""

    weight: float = Field(default=1.0, gt=0, description="its share of the samples, relative to those of the others")


Data = str | TextSource | tuple[WeightedText, ...]
"""A text: a name or a path, a source, or several that share the samples."""


def label(data: Data) -> str:
    """What a text is called in messages and results."""
    return " + ".join(map(str, data)) if isinstance(data, tuple) else str(data)


def parts(data: Data) -> Sequence[WeightedText]:
    """The texts of `data`, which for most is itself."""
    if isinstance(data, tuple):
        return data
    fields = {"path": data} if isinstance(data, str) else {n: getattr(data, n) for n in TextSource.model_fields}
    return (WeightedText.model_construct(**fields),)


def text_paths(data: Data) -> list[str]:
    """The names or paths in `data`."""
    return [part.path for part in parts(data)]


def is_hub(path: str) -> bool:
    """Whether a path can only mean a data set on the hub."""
    return _HUB_NAME.fullmatch(path) is not None and not is_known(Path(path)) and not Path(path).exists()


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that a template names, each once."""
    return tuple(dict.fromkeys(re.findall(r"\{([^{}]+)\}", template)))
