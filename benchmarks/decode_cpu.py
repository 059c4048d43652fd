"""Packed layers on a CPU against bfloat16: python -m benchmarks.decode_cpu [layers] [generate] [sparsity]

layers: one 8192 x 2048 layer, one thread, 1 and 16 rows of bfloat16 inputs: time as a share of `F.linear` with a dense
bfloat16 weight. generate: tokens per second of SmolLM2-135M-Instruct, packed against dense. sparsity: whether skipping
the zeros of DB-LLM's planes saves time.

Arms take turns in every round; a share is the median of the rounds' ratios. Weights rotate through more than the
caches.
Times are the thread's processor time, which other programs lengthen less than wall time; wall time stands
beside it. The error against float64 of the decoded weight is measured in the same run. A peer that is not installed or
fails is "not run".
"""

from __future__ import annotations

import copy
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import common
from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import Codebook
from qcli.core.formats.dual_binary import DualBinary
from qcli.core.formats.sign import Sign
from qcli.core.weight import Format, QuantizedWeight
from qcli.inference.backends import cpu
from qcli.inference.cpu.build import native_flags
from qcli.inference.linear import QuantLinear, packed_linear
from tests.inference.weights import random_weight

SHAPE, ROUNDS, CACHES = (8192, 2048), 21, 64 << 20
FORMATS: dict[str, Format] = {
    "8 bits g128": Affine(bits=8, group_size=128),
    "4 bits g128": Affine(bits=4, group_size=128),
    "4 bits g64": Affine(bits=4, group_size=64),
    "3 bits g128": Affine(bits=3, group_size=128),
    "3 bits g64": Affine(bits=3, group_size=64),
    "2 bits g128": Affine(bits=2, group_size=128),
    "2 bits g64": Affine(bits=2, group_size=64),
    "lcq 3 bits g64": Codebook(bits=3, group_size=64, rank=1, table_bits=8),
    "lcq 2 bits g64": Codebook(bits=2, group_size=64, rank=1, table_bits=8),
    "dbllm g64": DualBinary(group_size=64),
    "onebit": Sign(),
}
GOALS = {  # shares of bfloat16's time: 1 row; 16 rows are to take no longer
    "4 bits g128": 0.40,
    "3 bits g128": 0.45,
    "2 bits g128": 0.35,
    "lcq 2 bits g64": 0.35,
    "dbllm g64": 0.35,
    "onebit": 0.25,
}
Arm = Callable[[Tensor, int], Tensor]


def copies(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """As many copies as exceed the caches."""
    count = max(2, -(-CACHES // sum(tensor.nbytes for tensor in tensors.values())))
    return [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(count)]


def packed_arm(format: Format) -> tuple[Arm, Tensor]:
    """The product with a random weight of a format, and the weight in float64."""
    weight = random_weight(format, SHAPE)
    turns = copies(format.to_stored(weight))
    return lambda x, turn: packed_linear(x, format, SHAPE, turns[turn % len(turns)]), weight.dense().double()


def int4_arm() -> tuple[Arm, Tensor]:
    """torch's own 4-bit layer, groups of 128."""
    ops: Any = torch.ops.aten
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, SHAPE, generator=generator, dtype=torch.int32)
    scales = (torch.rand(SHAPE[1] // 128, SHAPE[0], 2, generator=generator) + 0.5).bfloat16()
    turns = copies({"packed": ops._convert_weight_to_int4pack_for_cpu(codes, 1)})
    scale, offset = (scales[:, :, part].T.double().repeat_interleave(128, dim=1) for part in (0, 1))
    dense = (codes.double() - 8) * scale + offset
    return lambda x, turn: ops._weight_int4pack_mm_for_cpu(x, turns[turn % len(turns)]["packed"], 128, scales), dense


def auto_round_arm() -> tuple[Arm, Tensor]:
    """auto-round-lib's layer. Version 0.16 fits no interleaved run: every arm of its process takes 4 ms (Zen 4), and
    it crashes on bfloat16 inputs."""
    if find_spec("auto_round_kernel") is None:
        raise ImportError("auto-round-lib is not installed")
    raise NotImplementedError("its threads slow the other arms of the process")


def timed(arms: dict[str, Arm], x: Tensor) -> dict[str, tuple[list[float], list[float]]]:
    """By arm: seconds of processor and of wall time of every round."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in arms}
    for turn in range(ROUNDS + 1):
        for name, arm in arms.items():
            wall, own = time.perf_counter(), time.thread_time()
            arm(x, turn)
            if turn:  # the first round warms up
                times[name][0].append(time.thread_time() - own)
                times[name][1].append(time.perf_counter() - wall)
    return times


def layers() -> dict[str, Any]:
    """Shares of bfloat16's time by rows and arm."""
    torch.set_num_threads(1)
    dense = [torch.randn(SHAPE).bfloat16() for _ in range(3)]
    arms: dict[str, Arm] = {"bfloat16": lambda x, turn: F.linear(x, dense[turn % 3])}
    values = {}
    not_run = {}
    made: dict[str, Callable[[], tuple[Arm, Tensor]]] = {
        "torch int4 g128": int4_arm,
        "auto-round-lib 4 bits g128": auto_round_arm,
        **{name: partial(packed_arm, format) for name, format in FORMATS.items()},
    }
    for name, make in made.items():
        try:
            arms[name], values[name] = make()
        except (ImportError, NotImplementedError, RuntimeError) as problem:
            not_run[name] = f"not run: {problem}"
    result: dict[str, Any] = {"shape": SHAPE, "threads": 1, "isa": isa(), "goals for 1 row": GOALS}
    for rows in (1, 4, 16):
        x = torch.randn(rows, SHAPE[1]).bfloat16()
        times = timed(arms, x)
        table: dict[str, Any] = dict(not_run)
        for name, arm in arms.items():
            table[name] = {
                "microseconds": round(1e6 * statistics.median(times[name][0])),
                "share": share(times[name][0], times["bfloat16"][0]),
                "share_of_wall_time": share(times[name][1], times["bfloat16"][1]),
            }
            if name in values:
                exact = x.double() @ values[name].T
                error = (arm(x, 0).double() - exact).norm() / exact.norm()
                table[name]["error"] = float(f"{error:.2g}")
        result[f"{rows} rows"] = table
    return result


def share(times: list[float], base: list[float]) -> float:
    """The median of the rounds' ratios."""
    return round(statistics.median(mine / other for mine, other in zip(times, base, strict=True)), 3)


def isa() -> str:
    """The instructions that the kernels use."""
    kernels = cpu.kernels()
    if isinstance(kernels, str):
        raise SystemExit(kernels)
    return str(kernels.qcli_isa().decode())


# ------------------------------------------------------------------------------------------------ whole models

TOKENS = 16
RECIPES = {
    "4 bits": ("--method", "rtn", "--bits", "4"),
    "3 bits": ("--method", "rtn", "--bits", "3"),
    "2 bits": ("--method", "rtn", "--bits", "2"),
}


def generate() -> dict[str, Any]:
    """Tokens per second of SmolLM2-135M-Instruct, dense bfloat16 and packed, with one thread."""
    from transformers import AutoModelForCausalLM

    from qcli.cli.main import main as qcli

    auto: Any = AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for name, flags in RECIPES.items():
            out = f"{folder}/{name.replace(' ', '-')}"
            try:
                qcli(["quantize", common.smollm2(), *flags, "--group-size", "64", "--out", out, "--quiet", "--json"])
            except SystemExit as done:
                if done.code:
                    raise
            models[name] = auto.from_pretrained(out, dtype=torch.bfloat16)
        models["dense bfloat16"] = unpacked(models["4 bits"])
        torch.set_num_threads(1)
        return {"tokens": TOKENS, "threads": 1, **rates(models)}


def unpacked(model: Any) -> Any:
    """A copy with dense bfloat16 layers, as transformers computes the original."""
    dense = copy.deepcopy(model)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, QuantLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.bfloat16)
            linear.weight.data = layer.weight.bfloat16()
            dense.set_submodule(name, linear)
    return dense


def rates(models: dict[str, Any]) -> dict[str, Any]:
    """By model: tokens per second, and its ratio to the dense model's."""
    prompt = torch.arange(100, 116)[None]
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(5):
        for name, model in models.items():
            started = time.thread_time()
            model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
            if turn:
                times[name].append(time.thread_time() - started)
    dense = times["dense bfloat16"]
    return {
        name: {
            "tokens_per_second": round(TOKENS / statistics.median(seen), 1),
            "ratio": round(statistics.median(base / mine for mine, base in zip(seen, dense, strict=True)), 3),
        }
        for name, seen in times.items()
    }


# ------------------------------------------------------------------------------------------------ DB-LLM's zeros


ZEROS = 0.56  # of the two planes, as in the paper


def sparsity() -> dict[str, Any]:
    """A layer of DB-LLM by adding only where a plane has a one, against the product's kernel and dense bfloat16.

    Instructions are counted by hand for AVX-512. Skipping: one addition for each one and 16 rows, and 4 instructions
    to find it. The kernel: of 32 codes and a row 2 products and a share of 3 instructions that extract both planes;
    from 6 rows on 1 product of decoded bfloat16.
    """
    torch.set_num_threads(1)
    shape, group = (2048, 2048), 64
    format = DualBinary(group_size=group)
    random = random_weight(format, shape)
    ones = (torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) >= ZEROS).to(torch.uint8)
    weight = QuantizedWeight(format, shape, ones[0] + 2 * ones[1], random.tables)
    turns = copies(format.to_stored(weight))
    alphas = [weight.tables[name].float() for name in ("alpha1", "alpha2")]
    dense = [weight.dense().bfloat16() for _ in range(8)]
    exact_weight, skip = weight.dense().double(), skipping()
    result: dict[str, Any] = {
        "shape": shape,
        "zeros": ZEROS,
        "additions per weight": {"skipping": round(float(ones.float().mean()) * 2, 3), "masked sums": 2},
    }
    for rows in (1, 16, 64):
        x = torch.randn(rows, shape[1]).bfloat16()
        transposed = x.T.float().contiguous()

        def skipped(x: Tensor, turn: int, transposed: Tensor = transposed) -> Tensor:
            y = torch.empty(shape[0], x.shape[0])
            codes = turns[turn % len(turns)]["weight_packed"]
            pointers = (tensor.data_ptr() for tensor in (codes, *alphas, transposed, y))
            skip(*map(ctypes.c_void_p, pointers), *map(ctypes.c_int64, (*shape, group, x.shape[0])))
            return y.T

        arms: dict[str, Arm] = {
            "dense bfloat16": lambda x, turn: F.linear(x, dense[turn % len(dense)]),
            "kernel": lambda x, turn: packed_linear(x, format, shape, turns[turn % len(turns)]),
            "skipping": skipped,
        }
        times, exact = timed(arms, x), x.double() @ exact_weight.T
        found = per_weight(rows)
        result[f"{rows} rows"] = {
            name: {
                "microseconds": round(1e6 * statistics.median(times[name][0])),
                "share": share(times[name][0], times["dense bfloat16"][0]),
                "error": float(f"{float((arm(x, 0).double() - exact).norm() / exact.norm()):.2g}"),
                **({"instructions per weight": found[name]} if name in found else {}),
            }
            for name, arm in arms.items()
        }
    return result


def per_weight(rows: int) -> dict[str, float]:
    """Counted AVX-512 instructions per weight."""
    ones = 2 * (1 - ZEROS)
    kernel = (2 * rows + 3) / 32 if rows < 6 else (rows + 3) / 32
    return {"skipping": round(ones * (-(-rows // 16) + 4), 2), "kernel": round(kernel, 2)}


def skipping() -> Any:
    """The compiled function of skip_zeros.cpp."""
    source = Path(__file__).with_name("skip_zeros.cpp")
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/skip.so"
        flags = ["-O3", "-std=c++17", "-fPIC", "-shared", "-mprefer-vector-width=512", *native_flags()]
        subprocess.run(["c++", *flags, "-o", file, str(source)], check=True)
        return ctypes.CDLL(file).skip_zeros


PARTS = {"layers": layers, "generate": generate, "sparsity": sparsity}


def main(names: list[str]) -> None:
    file = common.RESULTS / "decode_cpu.json"
    for name in names or PARTS:
        part = {"machine": common.machine(), **PARTS[name]()}
        print(json.dumps(part, indent=1))
        result = json.loads(file.read_text()) if file.exists() else {}
        result.pop("machine", None)
        common.save("decode_cpu", result | {"what": __doc__, name: part})


if __name__ == "__main__":
    main(sys.argv[1:])
