"""The same bytes from two runs on one GPU.

On a GPU, sums that many threads add to in turn round differently from run to run, and libraries choose their algorithms
by what is free or faster at the moment. torch has another algorithm for all that quantization and distillation need
(`torch.use_deterministic_algorithms`); it costs some speed. On a CPU every operation in use is deterministic as it is.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from qcli.utils.errors import UnsupportedError, UsageError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")  # those with which cuBLAS is deterministic; torch accepts no others
_COMPILER = "TORCHINDUCTOR_DETERMINISTIC"  # read when torch's compiler is imported
_COMPILER_SETTINGS = "torch._inductor.config"
_REFUSED = re.compile(r"^(\S+) does not have a deterministic implementation|not deterministic because it uses (CuBLAS)")


@contextmanager
def deterministic(device: torch.device, *, wanted: bool = True) -> Iterator[None]:
    """While open, operations on a GPU give the same bits at every run; on a CPU nothing changes.

    torch's settings are those of the whole process, and are restored at the end. cuBLAS reads its own once, at the
    first matrix product of a process: one that computed on the GPU before must have set CUBLAS_WORKSPACE_CONFIG=:4096:8
    from its start to give the same bits as one that did not.

    Raises:
        UsageError: CUBLAS_WORKSPACE_CONFIG has a value that makes cuBLAS non-deterministic.
        UnsupportedError: an operation (of a plug-in, or of a model's own code) has no deterministic algorithm.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    workspace = os.environ.get(WORKSPACE, _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise UsageError(
            f"{WORKSPACE}={workspace} makes matrix products non-deterministic",
            hint=f"unset it, or set it to {_WORKSPACES[0]}; or --no-deterministic",
        )
    compiled = _compiler_setting()
    with ExitStack() as settings:
        settings.enter_context(_environment({WORKSPACE: workspace, _COMPILER: "1"}))
        settings.enter_context(_attributes(torch.backends.cudnn, deterministic=True, benchmark=False))
        settings.enter_context(_attributes(torch.utils.deterministic, fill_uninitialized_memory=False))
        settings.callback(_set_compiler, compiled)
        _set_compiler(True)
        with _mode("error"):
            try:
                yield
            except RuntimeError as error:
                refused = _REFUSED.search(str(error))
                if refused is None:
                    raise
                raise UnsupportedError(
                    f"{refused[1] or refused[2]} has no deterministic implementation on a GPU",
                    hint="--no-deterministic computes with the one there is",
                ) from error


def determinism(device: torch.device, wanted: bool) -> dict[str, bool]:
    """What of it decides the bytes of a run on `device`, as part of the run's identity."""
    return {"deterministic": wanted} if device.type == "cuda" else {}


@contextmanager
def any_order() -> Iterator[None]:
    """While open, operations without a deterministic algorithm are allowed: for those whose results do not depend on
    the order of their sums, such as positions that a model counts in floating point."""
    with _mode("default"):
        yield


@contextmanager
def order_where_known() -> Iterator[None]:
    """While open, operations without a deterministic algorithm are allowed, and all others stay deterministic: for what
    a model's own code computes beside the blocks, of which nothing is known."""
    with warnings.catch_warnings(), _mode("warn" if torch.are_deterministic_algorithms_enabled() else "default"):
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
        yield


@contextmanager
def _mode(mode: str) -> Iterator[None]:
    """torch's debug mode: the same flags as `use_deterministic_algorithms`, which would import the compiler."""
    previous = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(mode)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(previous)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    previous = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _attributes(owner: Any, **values: bool) -> Iterator[None]:
    previous = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in previous.items():
            setattr(owner, name, value)


def _compiler_setting() -> bool:
    """Whether compiled functions are deterministic, now or as soon as the compiler is imported."""
    settings = sys.modules.get(_COMPILER_SETTINGS)
    if settings is None:
        return os.environ.get(_COMPILER) == "1"
    return bool(getattr(settings, "deterministic", False))


def _set_compiler(value: bool) -> None:
    settings = sys.modules.get(_COMPILER_SETTINGS)
    if hasattr(settings, "deterministic"):  # torch 2.9 has no such setting
        settings.deterministic = value  # type: ignore[union-attr]
