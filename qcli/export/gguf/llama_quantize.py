"""llama.cpp's own quantizer, as llama-cpp-python brings it.

It runs in a process of its own, this module as a script: llama.cpp ends the process where it meets what it does not
expect.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.utils.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PACKAGE = "llama-cpp-python"
TYPES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
"""llama.cpp's names for its mixtures of K-quants."""


def require_type(type: str) -> str:
    """The type as llama.cpp writes it, from any letter case.

    Raises:
        UsageError: it is none.
    """
    if type.upper() not in TYPES:
        raise UsageError(f"--type: no type {type!r}", hint=f"known types: {', '.join(TYPES)}")
    return type.upper()


def require() -> str:
    """The version of the package.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        raise UnsupportedError(
            f"K-quants are made by llama.cpp, and the package {PACKAGE} is not installed",
            hint=f"install it: pip install {PACKAGE}",
        ) from None


def quantize(file: Path, out: Path, type: str, importance: Mapping[str, NDArray[Any]], threads: int) -> None:
    """Quantize a GGUF file.

    Args:
        file: with matrices in floating point.
        type: of `TYPES`.
        importance: mean squares of inputs by name of the tensor, float32 `[in]`, those of experts one after another;
            tensors that have none, all of them perhaps, are rounded with equal weights.

    Raises:
        UnsupportedError: llama.cpp ended with an error.
    """
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="qcli-") as folder:
        moments = Path(folder) / "importance.npz"
        arrays: dict[str, Any] = {name: np.ascontiguousarray(values, np.float32) for name, values in importance.items()}
        np.savez(moments, **arrays)
        command = [sys.executable, "-P", "-m", __name__, str(file), str(out), type, str(moments), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not out.exists():
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"it ended with {done.returncode}"]
        raise UnsupportedError(
            f"llama.cpp ({PACKAGE} {require()}) does not quantize this model to {type}: {said[-1].strip()}",
            hint="another version of it may; or quantize with `qcli quantize` and pack that as gguf",
        )


def _main(file: str, out: str, type: str, importance: str, threads: str) -> int:
    import numpy as np

    llama: Any = import_module("llama_cpp")
    entry = getattr(llama, "llama_model_imatrix_data", None)
    if entry is None:
        sys.exit("this version does not take importance: 0.3.36 or later does")
    moments = dict(np.load(importance))
    table = (entry * (len(moments) + 1))()  # a last one without a name ends it
    for index, (name, values) in enumerate(moments.items()):
        pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        table[index] = entry(name=name.encode(), data=pointer, size=values.size)
    params = llama.llama_model_quantize_default_params()
    params.nthread = int(threads)
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{type}")
    if moments:
        params.imatrix = table
    llama.llama_backend_init()
    return int(llama.llama_model_quantize(file.encode(), out.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
