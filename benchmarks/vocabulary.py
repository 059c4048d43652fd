"""Head and embedding of SmolLM2-135M-Instruct, which are one tensor: python -m benchmarks.vocabulary WORK

Blocks by rtn at 8 bits in groups of 32; head and embedding dense, or in groups of 64. Calibration of gptq-like: 16
windows of 256 tokens of WikiText-2 valid. Score: the first windows of 512 tokens of the raw WikiText-2 test; KL(full
precision || quantized). WORK keeps the checkpoints: those that it has are not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import common
from qcli.evaluation.evaluate import compare
from qcli.evaluation.options import EvalOptions
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe
from qcli.utils.cache import Cache, default_folder

HEADS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "r8": {"bits": 8},
    "r6": {"bits": 6},
    "r4": {"bits": 4},
    "g4": {"bits": 4, "method": "gptq-like"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    given = parser.parse_args()
    text, model = common.assets() / "text", common.smollm2()
    calibration = {"data": str(text / "wikitext2.valid.detok.txt"), "samples": 16, "seq_len": 256}
    method = {"name": "rtn", "bits": 8, "group_size": 32}
    for name, head in HEADS.items():
        if not (given.work / name).exists():
            fields = {"model": model, "method": method, "calibration": calibration, "lm_head": head}
            quantize(load_recipe(None, {key: value for key, value in fields.items() if value}), given.work / name)
    options = EvalOptions([str(text / "wikitext2.test.raw.txt")], window=512, max_windows=given.windows)
    folders = [str(given.work / name) for name in HEADS]
    for head, found in zip(
        HEADS.values(), compare(folders, options, baseline=model, cache=Cache(default_folder())), strict=True
    ):
        (score,) = found.scores.values()
        row = {
            "head": "dense" if head is None else f"{head['bits']} bits, {head.get('method', 'rtn')}",
            "bytes": found.bytes,
            "model_bits_per_weight": found.model_bits_per_weight,
            "kl": found.kl,
            "top1_agreement": found.top1_agreement,
            "perplexity": score.perplexity,
            "baseline_perplexity": score.baseline_perplexity,
            "windows": score.windows,
        }
        print(row, flush=True)
        common.save_row("vocabulary", ("head",), row, __doc__)


if __name__ == "__main__":
    main()
