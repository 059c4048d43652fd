"""Quality on SmolLM2-135M-Instruct by the protocol of the published anchors: python -m benchmarks.quality SUITE...

Calibration: windows of 512 tokens at `random.Random(0)` offsets; score: WikiText-2 test, 20 windows of 512, no bos; KL
is the mean over tokens of KL(full precision || quantized); only block linears are quantized.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import common
from qcli.evaluation.evaluate import evaluate
from qcli.evaluation.options import EvalOptions
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe
from qcli.utils.cache import Cache
from qcli.utils.memory import return_large_blocks, use_huge_pages

Row = tuple[str, int, dict[str, Any]]  # name, calibration samples (0: none), options of the method and around it

BLOCKS = 30
W = {"w4g64": (4, 64), "w3g64": (3, 64), "w2g64": (2, 64), "w2g32": (2, 32)}
OTHER = {
    **{"w8g64": (8, 64), "w4row": (4, -1), "w3row": (3, -1)},
    **{f"w{bits}g{group_size}": (bits, group_size) for bits in (2, 3, 4) for group_size in (32, 48, 96)},
}
SECTIONS = ("transforms", "refine", "low_rank", "activations")  # options that are no method's
FLOAT = {"zero_point": "float"}
A8 = {"activations.bits": 8}
REFINED = {"refine.steps": 100}
TEQ = [{"name": "teq", "steps": 100}]
PLAIN = {
    "column_order": "none",
    "grid": "minmax",
    "refit_target": False,
    "residual": False,
    "refit_tables": False,
}
AS_ROUNDED = {"refit_target": False, "error_feedback": False, "refit_tables": False}


def _bits(width: str) -> dict[str, Any]:
    bits, group_size = (W | OTHER)[width]
    return {"bits": bits, "group_size": group_size}


def _row(method: str, width: str, samples: int, options: dict[str, Any]) -> Row:
    name = " ".join([f"{method} {width}", *(f"{key}={value}" for key, value in options.items())])
    return name, samples, {"name": method, **_bits(width), **options}


def _gptq(width: str, samples: int, **options: Any) -> Row:
    return _row("gptq-like", width, samples, options)


def _lcq(width: str, **options: Any) -> Row:
    return _row("lcq", width, 64, {"steps": 100, **options})


def _rtn(width: str, **options: Any) -> Row:
    return _row("rtn", width, 64 if options.get("grid") == "hessian" else 0, options)


SUITES: dict[str, list[Row]] = {
    "rtn": [
        *(_rtn(width, grid=grid) for width in W for grid in ("minmax", "search", "hessian")),
        *(_rtn(width, symmetric=True) for width in ("w4g64", "w3g64")),
    ],
    "main": [
        *(_gptq(width, 64, **FLOAT) for width in ("w3g64", "w2g64", "w2g32", "w4g64")),
        *(_gptq(width, 64) for width in ("w3g64", "w2g64")),
        *(_gptq(width, 64, symmetric=True) for width in ("w3g64", "w2g64")),
    ],
    "few-samples": [
        *(_gptq(width, 16, **FLOAT) for width in ("w3g64", "w2g64")),
        _gptq("w3g64", 16),
        _gptq("w3g64", 16, symmetric=True),
    ],
    "ablation": [
        row
        for width in ("w3g64", "w2g64")
        for row in (
            _gptq(width, 16, **FLOAT, refit_target=False),
            _gptq(width, 16, **FLOAT, residual=False),
            _gptq(width, 16, **FLOAT, column_order="none"),
            _gptq(width, 16, **FLOAT, grid="minmax"),
            _gptq(width, 16, **FLOAT, refit_tables=False),
            _gptq(width, 16, **FLOAT, column_order="group-aware"),
            _gptq(width, 16, **FLOAT, **PLAIN),
            _gptq(width, 16, **FLOAT, refit_target=False, gptaq_alpha=0.25),
        )
    ],
    "defaults": [
        _gptq(width, samples, **FLOAT, ridge=ridge, damping=damping)
        for width in ("w3g64", "w2g64")
        for samples in (16, 64)
        for ridge in (0.1, 0.4)
        for damping in (0.01, 0.1)
    ],
    "refined": [
        *(
            _gptq(width, 128, **FLOAT, **{"refine.steps": steps})
            for steps in (200, 100)
            for width in ("w2g64", "w3g64", "w2g32")
        ),
        *(_gptq(width, 128, **FLOAT) for width in ("w2g64", "w3g64", "w2g32")),
    ],
    "ptq": [
        *(_rtn(width) for width in ("w3g64", "w2g64")),
        *(
            _row("rtn", width, 64, {"refine.scope": scope, "refine.steps": 100})
            for width in ("w3g64", "w2g64")
            for scope in ("linear", "block")
        ),
        *(_gptq(width, 64) for width in ("w3g64", "w2g64")),
    ],
    "low-rank": [
        *(
            _gptq(width, 16, **FLOAT, **{"low_rank.rank": 8}, **options)
            for width in ("w3g64", "w2g64")
            for options in ({}, {"low_rank.of": "weight"}, {"low_rank.weighted": False, "low_rank.of": "weight"})
        ),
        *(
            _row("rtn", width, samples, {"low_rank.rank": 8, "low_rank.weighted": samples > 0})
            for width in ("w3g64", "w2g64")
            for samples in (0, 16)
        ),
    ],
    "activations": [
        row
        for width in ("w4g64", "w8g64")
        for row in (
            _rtn(width),
            _rtn(width, **A8),
            _gptq(width, 16),
            _gptq(width, 16, **A8),
            *(
                _row("rtn", width, 16, {**A8, "refine.scope": scope, "refine.steps": 50})
                for scope in ("linear", "block")
            ),
        )
    ],
    "teq": [
        *(_row("teq", width, 16, {"steps": 100}) for width in ("w3g64", "w4g64", "w2g64", "w4row", "w3row")),
        *(_rtn(width) for width in ("w3g64", "w4g64", "w2g64", "w4row", "w3row")),
        _gptq("w3g64", 16, **FLOAT, **PLAIN),
        _gptq("w3g64", 16, **FLOAT, **PLAIN, transforms=TEQ),
        *(_gptq(width, 16, **FLOAT) for width in ("w3g64", "w2g64")),
        *(_gptq(width, 16, **FLOAT, transforms=TEQ) for width in ("w3g64", "w2g64")),
        _row("rtn", "w3g64", 16, {"transforms": [{**TEQ[0], "gradient": "straight-through"}]}),
        _row("teq", "w3g64", 16, {"steps": 1000}),
    ],
    "lcq": [  # by bits per weight: rank 1 against higher ranks, against uniform grids trained just as long
        *(_lcq(width) for width in ("w2g32", "w3g32", "w2g64", "w3g64", "w4g64", "w2g96", "w3g96")),
        *(_gptq(width, 64, **FLOAT, **REFINED) for width in ("w2g64", "w3g64")),
        *(_gptq(width, 64, **REFINED) for width in ("w2g64", "w3g64", "w2g96", "w4g64")),
        *(_lcq(width, rank=rank) for width, rank in (("w2g48", 2), ("w2g64", 3), ("w2g64", 2), ("w2g96", 2))),
        *(_lcq(width, rank=rank) for width, rank in (("w3g48", 2), ("w3g96", 2), ("w3g96", 4))),
    ],
    "lcq-ablation": [
        row
        for width in ("w2g32", "w3g32")
        for row in (
            _lcq(width),
            _lcq(width, rank=2),
            _lcq(width, table_bits=16),
            _lcq(width, basis_rows=64),
            _lcq(width, refit_tables=False),
            _lcq(width, error_feedback=False),
            _lcq(width, steps=0),
            _lcq(width, steps=0, refit_tables=False),
            _lcq(width, steps=0, error_feedback=False),
        )
    ],
    "dbllm": [  # at equal bits: the paper's levels and start, signs for bits, a uniform grid with two tables
        *(
            _row("dbllm", "w2g64", 16, options)
            for options in ({}, {"levels": "symmetric"}, {"start": "published"}, {"start": "published", **AS_ROUNDED})
        ),
        _gptq("w2g64", 16, **FLOAT),
    ],
    "auto": [
        ("gptq-like auto 3.3", 16, {"name": "gptq-like", "bits": "auto", "target_bpw": 3.3}),
        _gptq("w3g64", 16),
    ],
    "transfer": [_gptq(width, 16, **FLOAT) for width in ("w3g64", "w2g64", "w4g64")],
}


def measure(model: str, row: Row, data: Path, score: Path, windows: int, blocks: int, cache: Cache) -> dict[str, Any]:
    """Quantize and evaluate one row; only the first `blocks` of the model's 30; the baseline runs once a `cache`."""
    name, samples, options = row
    flags: dict[str, Any] = {
        key if key.partition(".")[0] in SECTIONS else f"method.{key}": value for key, value in options.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        flags |= {"model": model, "calibration.data": str(data)}
        flags |= {"overrides": [{"match": f"model.layers.{n}.*", "dense": True} for n in range(blocks, BLOCKS)]}
        flags |= {"calibration.samples": max(samples, 1), "calibration.seq_len": 512}
        result = _fresh(flags, f"{folder}/out")
        found = evaluate(
            f"{folder}/out", EvalOptions([str(score)], window=512, max_windows=windows), baseline=model, cache=cache
        )
    (scored,) = found.scores.values()
    return {
        "name": name,
        "samples": samples,
        "options": options,
        "bits_per_weight": found.bits_per_weight,
        "kl": found.kl,
        "perplexity": scored.perplexity,
        "baseline_perplexity": scored.baseline_perplexity,
        "top1_agreement": found.top1_agreement,
        **result,
    }


def _fresh(flags: dict[str, Any], out: str) -> dict[str, Any]:
    """What quantizing took, in a process of its own: its memory is of nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_quantized, flags, out).result()


def _quantized(flags: dict[str, Any], out: str) -> dict[str, Any]:
    return_large_blocks()  # as the command does
    use_huge_pages()
    recipe = load_recipe(None, flags)
    result = quantize(recipe, out)
    return {
        "seconds": round(result.seconds, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_memory": result.peak_memory,
        "fallbacks": len(result.fallbacks),
        "training": result.training,
        **({"allocation": result.allocation} if result.allocation else {}),
        **result.facts,
    }


def full_precision(gguf: str, folder: Path) -> str:
    """The GGUF file's weights as a float32 folder: the same model, opened faster."""
    from transformers import AutoModelForCausalLM

    from qcli.models.open import open_source

    source = open_source(gguf)
    model = AutoModelForCausalLM.from_config(source.hf_config(), dtype="float32")
    model.load_state_dict(source.read(source.tensors()), strict=False)
    model.tie_weights()
    model.save_pretrained(folder / "float32")
    source.copy_companions(folder / "float32")
    return str(folder / "float32")


def degridded(model: str, folder: Path) -> str:
    """The model with function-preserving rescaling that takes it off the grid it was once quantized to."""
    scripts = common.assets() / "scripts"
    source = Path(model)
    for script, arguments in (
        ("gguf_to_hf.py", [str(source.parent), source.name, str(folder / "hf")]),
        ("degrid.py", [str(folder / "hf"), str(folder / "degridded")]),
    ):
        subprocess.run([sys.executable, str(scripts / script), *arguments], check=True, stdout=sys.stderr)
    return str(folder / "degridded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", nargs="+", choices=SUITES)
    parser.add_argument("--calibration", choices=("wikitext2", "c4"), default="wikitext2")
    parser.add_argument("--degrid", action="store_true", help="score the de-gridded model")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="quantize the first ones only: cheap screening")
    parser.add_argument("--only", default="", help="rows whose name has a match of this pattern")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no row after this time")
    arguments = parser.parse_args()
    text = common.assets() / "text"
    data = text / ("wikitext2.valid.detok.txt" if arguments.calibration == "wikitext2" else "c4_sample.jsonl")
    score = text / "wikitext2.test.detok.txt"
    screening = [] if arguments.blocks == BLOCKS else [f"{arguments.blocks}-blocks"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        gguf = common.smollm2()
        model = degridded(gguf, Path(folder)) if arguments.degrid else full_precision(gguf, Path(folder))
        for suite in arguments.suite:
            for row in SUITES[suite]:
                if re.search(arguments.only, row[0]) and time.monotonic() - started < 60 * arguments.minutes:
                    found = measure(
                        model, row, data, score, arguments.windows, arguments.blocks, Cache(Path(folder) / "cache")
                    )
                    print(
                        f"{found['name']:60} n={found['samples']:<3} bpw {found['bits_per_weight']:.3f} "
                        f"KL {found['kl']:.4f} ppl {found['perplexity']:.2f} {found['seconds']:.0f} s",
                        flush=True,
                    )
                    name = "-".join(
                        ["quality", suite, arguments.calibration, *["degrid"] * arguments.degrid, *screening]
                    )
                    common.save_row(name, ("name", "samples"), found | {"windows": arguments.windows}, __doc__)


if __name__ == "__main__":
    main()
