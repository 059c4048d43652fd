"""The folder that a command writes if nobody named one: after the model, the method and its bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qcli.cli.ui.session import Session
from qcli.utils.paths import portable_name

if TYPE_CHECKING:
    from qcli.recipe.recipe import Recipe


def out_of(session: Session, given: str | Path | None, default: str, opened: Callable[[], object]) -> Path:
    """The folder to write: the one that was given, or `default` in the working directory, which is told.

    Args:
        opened: opens what the command reads, so that a wrong name fails before the output is told.
    """
    if given is not None:
        return Path(given)
    opened()
    session.note(f"output: {default}")
    return Path(default)


def quantized_name(recipe: Recipe) -> str:
    """`SmolLM2-135M-gptq-like-3bit`; where bits are chosen, `SmolLM2-135M-gptq-like-3.5bpw`."""
    bits = getattr(recipe.method, "bits", None)
    chosen = "" if bits is None else f"-{bits}bit"
    if recipe.allocation is not None:
        chosen = f"-{recipe.allocation.target_bpw:g}bpw"
    return f"{model_name(recipe.model)}-{recipe.method.name}{chosen}"


def model_name(model: str) -> str:
    """The last part of a hub id or a path, without revision and file type."""
    name = portable_name(model).rpartition("/")[2]
    if not os.path.exists(model):
        name = name.partition("@")[0]
    return name.removesuffix(".gguf") or "model"


def checkpoint_name(folder: Path) -> str:
    """The name of a checkpoint's folder; of a stage of `qcli run`, that of the run, which says more."""
    from qcli.pipeline.record import DISTILLED, PACKED, QUANTIZED, RECORD

    folder = folder.absolute()
    staged = folder.name in (QUANTIZED, DISTILLED, PACKED) and (folder.parent / RECORD).exists()
    return (folder.parent if staged else folder).name or "model"
