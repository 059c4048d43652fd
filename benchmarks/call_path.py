"""How far a recipe travels: the files and rooms that `qcli quantize` enters before the first group is quantized.

    python -m benchmarks.call_path MODEL TEXT

A room is an entry at the top of the package, a folder or a file. Prints each file in order of first entry, the number
of rooms, and how many borders between two rooms a call has crossed; keeps all of it under `results/`. Only functions
that run are counted, imports are not.
"""

from __future__ import annotations

import sys
import tempfile
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType
from typing import Any

import qcli
from benchmarks.common import save

ROOT = Path(qcli.__file__).parent
METHOD = "gptq-like"


def calls_before_the_method(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Files of the package in order of first entry, by path in it, and the borders crossed, as `recipe -> utils`."""
    from qcli.cli.main import app

    files: dict[str, None] = {}
    borders: dict[str, None] = {}

    def enter(frame: FrameType, event: str, _: Any) -> None:
        is_function = frame.f_code.co_flags & CO_OPTIMIZED  # the bodies of modules and classes run while importing
        if event != "call" or not is_function or (file := _in_package(frame)) is None:
            return
        files.setdefault(file)
        caller = frame.f_back and _in_package(frame.f_back)
        if caller and room(caller) != room(file):
            borders.setdefault(f"{room(caller)} -> {room(file)}")
        if frame.f_code.co_name == "quantize" and Path(file).stem == METHOD.replace("-", "_"):
            sys.setprofile(None)

    sys.setprofile(enter)
    app(args=arguments, standalone_mode=False)
    return list(files), list(borders)


def room(file: str) -> str:
    """`recipe` for `recipe/load.py`."""
    return Path(file).parts[0].removesuffix(".py")


def _in_package(frame: FrameType) -> str | None:
    file = frame.f_code.co_filename
    return str(Path(file).relative_to(ROOT)) if file.startswith(str(ROOT)) else None


def run(model: str, text: str) -> None:
    """Measure one call and keep the result."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--method", METHOD, "--data", text, "--samples", "4", "--seq-len", "32", "--group-size", "32"]
        quiet = ["--device", "cpu", "--quiet", "--set", "method.group_tail=ragged"]
        files, borders = calls_before_the_method(["quantize", model, *settings, *quiet, "--out", f"{folder}/out"])
    rooms = sorted({room(file) for file in files})
    print(*files, f"{len(files)} files in {len(rooms)} rooms, {len(borders)} borders between them", sep="\n")
    save("call-path", {"command": "quantize", "method": METHOD, "files": files, "rooms": rooms, "borders": borders})


if __name__ == "__main__":
    run(*sys.argv[1:])
