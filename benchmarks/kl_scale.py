"""What a KL means in perplexity, agreement and tasks: python -m benchmarks.kl_scale WORK

SmolLM2-135M-Instruct by rtn and gptq-like (16 windows of 512 tokens of WikiText-2 valid) at falling bits, against
itself: KL(full precision || quantized), perplexity and top-1 agreement on the first windows of 512 tokens of the raw
WikiText-2 test, and accuracy on the first questions of ARC easy, PIQA and LAMBADA. WORK keeps the checkpoints: those
that it has are not made again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks import common
from qcli.evaluation.evaluate import compare
from qcli.evaluation.options import EvalOptions
from qcli.evaluation.tasks import Tasks
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe
from qcli.utils.cache import Cache, default_folder

TASKS = ["local_arc_easy", "local_piqa", "local_lambada"]

SETTINGS = [
    ("rtn", 8, 64),
    ("rtn", 6, 64),
    ("rtn", 5, 64),
    ("gptq-like", 4, 64),
    ("gptq-like", 3, 32),
    ("gptq-like", 3, 64),
    ("rtn", 4, 64),
    ("gptq-like", 2, 32),
    ("gptq-like", 2, 64),
    ("rtn", 3, 64),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--questions", type=int, default=200)
    given = parser.parse_args()
    work = given.work.resolve()
    text, model = common.assets() / "text", common.smollm2()
    calibration = {"data": str(text / "wikitext2.valid.detok.txt"), "samples": 16, "seq_len": 512}
    os.chdir(common.assets())  # the task files name their data relative to it
    tasks = Tasks(TASKS, "lm_eval_tasks", given.questions, None, trusted=True)
    options = EvalOptions([str(text / "wikitext2.test.raw.txt")], 512, given.windows, tasks)
    for name, bits, group_size in SETTINGS:
        folder = work / f"{name}-{bits}-g{group_size}"
        if not folder.exists():
            method = {"name": name, "bits": bits, "group_size": group_size}
            quantize(load_recipe(None, {"model": model, "method": method, "calibration": calibration}), folder)
        (found,) = compare([str(folder)], options, baseline=model, cache=Cache(default_folder()))
        (score,) = found.scores.values()
        row = {
            "method": name,
            "bits": bits,
            "group_size": group_size,
            "windows": score.windows,
            "questions": given.questions,
            "bits_per_weight": found.bits_per_weight,
            "kl": found.kl,
            "perplexity": score.perplexity,
            "baseline_perplexity": score.baseline_perplexity,
            "top1_agreement": found.top1_agreement,
            "tasks": {task: result["score"] for task, result in found.to_json()["tasks"].items()},
            "baseline_tasks": {task: result["baseline"] for task, result in found.to_json()["tasks"].items()},
        }
        print(name, bits, group_size, found.kl, found.top1_agreement, flush=True)
        common.save_row("kl_scale", ("method", "bits", "group_size"), row, __doc__)


if __name__ == "__main__":
    main()
