"""What may be done after a command: commands to copy, whatever they need included.

They are computed only where they are shown, without reading weights, and one that might be refused is not shown.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qcli.utils.errors import QcliError

if TYPE_CHECKING:
    from qcli.utils.trust import Trust

_PROMPT, _QUESTION = "Once upon a time", "Tell me a story."
_FORMATS = ("compressed-tensors", "gguf", "gptq", "awq")  # the first that surely holds a checkpoint is proposed
_PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
_SHELL = re.compile(r"^\$ (.+)$", re.MULTILINE)


def after_checkpoint(folder: Path, original: str | None, trust: Trust) -> Iterator[str]:
    """After a checkpoint has been made: measure it, try it, load it, pack it.

    Args:
        original: the model that it is compared with; None: it has been.
    """
    if original is not None:
        yield _qcli(trust, "eval", folder, "--baseline", original)
    yield from _generate(folder, trust)
    yield from _load(folder)
    yield from _pack(folder, trust)


def after_evaluation(folder: Path, trust: Trust) -> Iterator[str]:
    """After a model has been measured: try and pack it, if it is a checkpoint of qcli's that is not packed."""
    from qcli.models.manifest import MANIFEST, Manifest

    if (folder / MANIFEST).is_file() and Manifest.read(folder).packed_as is None:
        yield from _generate(folder, trust)
        yield from _pack(folder, trust)


def after_calibration(folder: Path, model: str, revision: str | None, trust: Trust) -> Iterator[str]:
    """After a calibration: quantize with it, in groups that fit the model."""
    from qcli.quantization.plan import make_plan
    from qcli.recipe.load import load_recipe

    given = {"model": model, "revision": revision, "calibration.data": str(folder)}
    for tail in ({}, {"method.group_tail": "ragged"}):
        try:
            make_plan(load_recipe(None, given | tail), trust)
        except QcliError:
            continue
        flags = [*(["--revision", revision] if revision else []), *(["--group-tail", "ragged"] if tail else [])]
        yield _qcli(trust, "quantize", model, *flags, "--data", folder)
        return


def after_packing(folder: Path, loading: str, trust: Trust) -> Iterator[str]:
    """After packing: serve or load it.

    Args:
        loading: Markdown that says how, as in its model card.
    """
    for command in _SHELL.findall(loading):
        yield command.replace("DIR", shlex.quote(str(folder)))
    yield from _in_python(loading, folder)
    yield from _generate(folder, trust)


def _pack(folder: Path, trust: Trust) -> Iterator[str]:
    from qcli.export.packable import surely_packable

    if (format := surely_packable(folder, _FORMATS, trust)) is not None:
        yield _qcli(trust, "pack", folder, "--format", format)


def _generate(folder: Path, trust: Trust) -> Iterator[str]:
    from qcli.data.chats import chat_template
    from qcli.models.open import open_source

    try:
        chats = chat_template(open_source(str(folder), trust)) is not None
    except QcliError:
        return
    prompt = ("--chat", "--prompt", _QUESTION) if chats else ("--prompt", _PROMPT)
    yield _qcli(trust, "generate", folder, *prompt)


def _load(folder: Path) -> Iterator[str]:
    from qcli.models.folder import read_config
    from qcli.models.loadable import loading_code
    from qcli.models.native import LOADING

    yield from _in_python(loading_code(LOADING, read_config(folder)), folder)


def _in_python(loading: str, folder: Path) -> Iterator[str]:
    """An interpreter that has run the code of a Markdown text."""
    for code in _PYTHON.findall(loading):
        lines = (line.partition("#")[0].strip() for line in code.splitlines())
        script = "; ".join(filter(None, lines)).replace('"DIR"', json.dumps(str(folder)))
        yield shlex.join(["python", "-i", "-c", script])


def _qcli(trust: Trust, *arguments: object) -> str:
    trusted = ["--trust-remote-code"] if trust.remote_code else []
    return shlex.join(["qcli", *map(str, arguments), *trusted])
