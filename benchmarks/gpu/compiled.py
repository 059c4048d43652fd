"""The kernels compiled ahead of time, which needs no GPU: registers, spills, and instructions a weight.

Must run without TRITON_INTERPRET. The shapes are those of a layer of 14336 x 4096.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.common import save
from benchmarks.gpu.layers import FORMATS
from qcli.algorithms.solvers import feedback_kernel
from qcli.core import fake_look_up_kernel, fake_quantize_kernel, fake_sign_kernel
from qcli.core.weight import Rounder, Rule
from qcli.inference.backends import triton as backend
from qcli.inference.cuda import kernels

SHAPE = (14336, 4096)
_KERNELS = ("gemv", "arrange", "matmul", "collect", "decode")
_OPERANDS: dict[Rule, list[tuple[int, ...]]] = {"grid": [()], "table": [(16,), (15,)], "signs": [(), ()]}
_LEVELS = {"table": 16, "fdb": 2, "symmetric": 2}
PROCESSORS = 132
_OBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_TYPES = {
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


class _Recorded:
    """Stands for a kernel: compiles the call in place of launching it."""

    def __init__(self, kernel: Any, arch: int, results: list[dict[str, Any]]) -> None:
        self.kernel, self.arch, self.results = kernel, arch, results

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.results.append(self._compile(arguments, options))

    def _compile(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        kernel = self.kernel
        launch = {key: options.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in options}
        signature: dict[str, str] = dict.fromkeys(options, "constexpr")
        constants = dict(options)
        divisible: dict[tuple[int], Any] = {}
        for place, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name] = _TYPES[value.dtype]
                divisible[(place,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    divisible[(place,)] = [["tt.divisibility", 16]]
        ordered = {name: signature[name] for name in kernel.arg_names}
        source = ASTSource(kernel, signature=ordered, constexprs=constants, attrs=divisible)
        made = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=launch)
        return {"kernel": kernel.__name__, "arch": self.arch, **_facts(made.asm["cubin"], made.asm["ptx"])}


def _facts(cubin: bytes, ptx: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([_OBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    names = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", sass, re.M)
    return {
        "registers": registers,
        "spilled_bytes": stack,
        "instructions": len(names),
        "widest_load": max((name for name in names if name.startswith("LDG")), key=_width, default=""),
        "tensor_cores": any(name.startswith(("HGMMA", "HMMA")) for name in names),
    }


def _width(load: str) -> int:
    return 128 if "128" in load else 64 if "64" in load else 32


def compiled(names: list[str], arch: int, rows: int) -> list[dict[str, Any]]:
    """What the launches of one call compile to, by format; the first rows are those of the format's name."""
    results = []
    for name in names:
        found: list[dict[str, Any]] = []
        launches = SimpleNamespace(**{name: _Recorded(getattr(kernels, name), arch, found) for name in _KERNELS})
        stored = FORMATS[name].stored(SHAPE)
        tensors = {suffix: torch.empty(entry.shape, dtype=entry.torch_dtype) for suffix, entry in stored.items()}
        x = torch.empty(rows, SHAPE[1], dtype=torch.bfloat16)
        with (
            mock.patch.object(backend, "_kernels", return_value=launches),
            mock.patch.object(backend, "_processors", return_value=PROCESSORS),
        ):
            backend.Triton().linear(x, FORMATS[name], SHAPE, tensors, None)
        results += [{"format": name, "rows": rows, **fact} for fact in found]
    return results


def trained(arch: int) -> list[dict[str, Any]]:
    """What kernels of error feedback and of training compile to."""
    found: list[dict[str, Any]] = []

    def recorded(module: Any, name: str) -> Any:
        return mock.patch.object(module, name, _Recorded(getattr(module, name), arch, found))

    block, taken = torch.empty(128, SHAPE[0]), torch.empty(128, 128)
    with recorded(feedback_kernel, "round_block"):
        for rule, operands in _OPERANDS.items():
            shaped = [torch.empty(128, SHAPE[0], *shape) for shape in operands]
            feedback_kernel.round_columns(block, taken, Rounder(print, tuple(shaped), block, rule, (0, 7)), taken)
    groups = torch.empty(SHAPE[0], SHAPE[1] // 128, 128)
    scale = torch.empty(*groups.shape[:2], 1)
    with recorded(fake_quantize_kernel, "quantize_rows"), recorded(fake_quantize_kernel, "gradients_of_rows"):
        value = fake_quantize_kernel.forward(groups, scale, scale, 0.0, (0, 7), torch.bfloat16)
        fake_quantize_kernel.backward(value, groups, scale, scale, 0.0, (0, 7), True)
    with recorded(fake_look_up_kernel, "look_up_rows"), recorded(fake_look_up_kernel, "gradients_of_look_up"):
        for kind, entries in _LEVELS.items():
            tables = torch.empty(*groups.shape[:2], entries)
            value = fake_look_up_kernel.forward(groups, groups, tables, kind, torch.bfloat16)
            fake_look_up_kernel.backward(value, groups, groups, tables, kind)
    scales = torch.empty(SHAPE[1]), torch.empty(SHAPE[0], 1)
    with recorded(fake_sign_kernel, "sign_rows"), recorded(fake_sign_kernel, "gradients_of_signs"):
        weight = groups.view(SHAPE)
        value = fake_sign_kernel.forward(weight, weight, *scales, torch.bfloat16)
        fake_sign_kernel.backward(value, weight, weight, *scales, True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--arch", default="80,90")
    parser.add_argument("--rows", default="1,16,256")
    parser.add_argument("--json", action="store_true", help="print the results, and keep none")
    given = parser.parse_args()
    results = [
        result
        for arch in map(int, given.arch.split(","))
        for rows in map(int, given.rows.split(","))
        for result in compiled(given.formats.split(","), arch, rows)
    ]
    results += [result for arch in map(int, given.arch.split(",")) for result in trained(arch)]
    if given.json:
        print(json.dumps(results))
        return
    for result in results:
        print(result)
    save("gpu_compiled", {"shape": list(SHAPE), "rows": results})


if __name__ == "__main__":
    main()
