"""What distillation gains at 1 and 2 bits: python -m benchmarks.distillation SUITE... [--steps N]

Students are trained on text that their teacher has written, and scored on text that it wrote with another seed
(stories), or trained on WikiText-2 valid and scored on the first 20 windows of WikiText-2 test (smollm2): KL(teacher ||
student) and perplexity before training, after block refinement, and after distillation.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.quality import full_precision
from qcli.distillation.distill import distill
from qcli.evaluation.evaluate import evaluate
from qcli.evaluation.options import EvalOptions
from qcli.quantization.calibrate import calibrate
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe

UNIFORM = {"method.name": "gptq-like", "method.bits": 2, "method.zero_point": "float"}
RAGGED = {"method.group_tail": "ragged"}  # stories260k has rows of 172
METHODS: dict[str, dict[str, Any]] = {
    "onebit": {"method.name": "onebit"},
    "dbllm g32": {"method.name": "dbllm", "method.group_size": 32, **RAGGED},
    "dbllm g64": {"method.name": "dbllm", "method.group_size": 64},
    "gptq-like g32": {**UNIFORM, "method.group_size": 32, **RAGGED},
    "gptq-like g64": {**UNIFORM, "method.group_size": 64},
}
ALL = {"train": ["tables", "weights"], "weights_lr": 0.02, "tables_lr": 4e-3}
SMALL_STEPS = {"weights_lr": 5e-3, "tables_lr": 1e-3}  # for batches of one window
RATES = ((0.0025, 2e-3), (0.007, 2e-3), (0.02, 2e-3), (0.02, 6e-3), (0.05, 6e-3))  # of weights, of tables
GAMMAS = (0.0, 0.1, 0.5, 2.0)
SEEDS = (0, 1, 2)


class Bench:
    """One teacher, its text, and the students made of it so far.

    Args:
        teacher: folder of the model.
        text, scored: what students are trained and scored on; None: text that the teacher writes.
        samples, seq_len: of the text to train on.
        calibrated: samples that students are quantized and refined with.
        refined: steps of the refinement of a block.
        recipe: further fields of every recipe.
    """

    def __init__(
        self,
        name: str,
        teacher: str,
        folder: Path,
        *,
        text: Path | None,
        scored: Path | None,
        samples: int,
        seq_len: int,
        calibrated: int,
        refined: int,
        recipe: Mapping[str, Any],
    ) -> None:
        self.name, self.teacher, self.folder, self.seq_len, self.calibrated = name, teacher, folder, seq_len, calibrated
        self.refined, self.recipe, self.samples = refined, recipe, samples
        self.text = text or self._written("text", samples, 0)
        self.scored = scored or self._written("scored", 40, 1000)

    def student(self, method: str, refined: bool) -> Path:
        """The checkpoint of a method; scored when it is made."""
        out = self.folder / f"{method} {'refined' if refined else ''}".strip().replace(" ", "-")
        if not out.exists():
            fields = {**METHODS[method], **({"refine.steps": self.refined} if refined else {})}
            fields |= {key: value for key, value in self.recipe.items() if not key.startswith("distill.")}
            fields |= {
                "model": self.teacher,
                "calibration.data": str(self.text),
                "calibration.samples": self.calibrated,
            }
            recipe = load_recipe(None, fields | {"calibration.seq_len": self.seq_len})
            result = quantize(recipe, out)
            more = {"refined": self.refined if refined else 0, "seconds": round(result.seconds, 1)}
            self.save(f"{method}{', refined' if refined else ''}", out, more)
        return out

    def distill(self, method: str, options: dict[str, Any], *, refined: bool = True, seed: int = 0) -> None:
        """Train a student and score it."""
        student = self.student(method, refined)
        settings = ", ".join(f"{key} {value}" for key, value in options.items() if value != ALL.get(key))
        row = f"{method}{', refined' if refined else ''}, distilled: {settings}, seed {seed}"
        out = self.folder / "distilled"
        fields = {**self.recipe, **{f"distill.{key}": value for key, value in (ALL | options).items()}}
        fields |= {"model": self.teacher, "seed": seed, "calibration.data": str(self.text)}
        fields |= {"calibration.samples": self.samples, "calibration.seq_len": self.seq_len}
        recipe = load_recipe(None, fields)
        result = distill(student, recipe, out)
        details: dict[str, Any] = {"seed": seed, "options": ALL | options, "seconds": round(result.seconds, 1)}
        self.save(row, out, details | {"tokens": self._tokens(fields), "curve": result.outcome.curve})
        shutil.rmtree(out)

    def save(self, row: str, checkpoint: Path, more: dict[str, Any]) -> None:
        """Score a checkpoint and keep its row."""
        evaluation = evaluate(
            str(checkpoint), EvalOptions([str(self.scored)], window=self.seq_len, max_windows=20), baseline=self.teacher
        )
        (scored,) = evaluation.scores.values()
        print(
            f"{row:90} bpw {evaluation.bits_per_weight:.3f} KL {evaluation.kl:.4f} ppl {scored.perplexity:.2f}",
            flush=True,
        )
        figures = {"bits_per_weight": evaluation.bits_per_weight, "kl": evaluation.kl, "perplexity": scored.perplexity}
        figures |= {"baseline_perplexity": scored.baseline_perplexity, "top1_agreement": evaluation.top1_agreement}
        common.save_row(f"distillation-{self.name}", ("name",), {"name": row, **figures, **more}, __doc__)

    def _written(self, name: str, samples: int, seed: int) -> Path:
        out = self.folder / name
        if not out.exists():
            fields = {"model": self.teacher, "calibration.data": "self", "seed": seed}
            fields |= {"calibration.samples": samples, "calibration.seq_len": self.seq_len}
            calibrate(load_recipe(None, fields), out)
        return out

    def _tokens(self, fields: dict[str, Any]) -> int:
        passes = max(1, fields.get("distill.batch_tokens", 2048) // self.seq_len) * fields.get("distill.accumulate", 1)
        return int(fields["distill.steps"] * passes * self.seq_len)


def stories(folder: Path, steps: int, refined: int | None, selected: list[str]) -> None:
    """stories260k: everything to convergence from one token budget."""
    teacher = str(common.assets() / "models" / "stories260k")
    bench = Bench(
        "stories",
        teacher,
        folder,
        text=None,
        scored=None,
        samples=640,
        seq_len=256,
        calibrated=128,
        refined=refined or 200,
        recipe={"dtype": "float32", "distill.checkpointing": False},  # twice as fast in so small a model
    )
    if "methods" in selected:
        for method in ("gptq-like g32", "dbllm g32", "onebit"):
            bench.student(method, refined=False)
            bench.distill(method, {"steps": steps}, refined=False)
            bench.distill(method, {"steps": steps})
    if "losses" in selected:
        for loss in ({"loss": "onebit"}, {"hidden_mse": 0.1}):
            bench.distill("onebit", {"steps": steps, **loss})
    if "rates" in selected:
        for method in ("dbllm g32", "gptq-like g32"):
            for weights_lr, tables_lr in RATES:
                bench.distill(method, {"steps": steps // 3, "weights_lr": weights_lr, "tables_lr": tables_lr})
    if "dad" in selected:
        for seed in SEEDS:
            for gamma in GAMMAS:
                bench.distill(
                    "dbllm g32", {"steps": steps // 3, "loss": "dad", "gamma": gamma, "plain": 0.0}, seed=seed
                )


def smollm2(folder: Path, steps: int, refined: int | None, selected: list[str]) -> None:
    """SmolLM2-135M-Instruct: what two cores can carry."""
    teacher = full_precision(common.smollm2(), folder)
    text = common.assets() / "text"
    bench = Bench(
        "smollm2",
        teacher,
        folder,
        text=text / "wikitext2.valid.detok.txt",
        scored=text / "wikitext2.test.detok.txt",
        samples=128,
        seq_len=512,
        calibrated=64,
        refined=refined or 100,
        recipe={},
    )
    for method, train in (("dbllm g64", ALL["train"]), ("gptq-like g64", ["tables"]), ("onebit", ALL["train"])):
        if any(name in method for name in selected):
            if train == ALL["train"]:  # what the others start from stands in benchmarks.quality
                bench.student(method, refined=False)
            options = {"steps": steps, "judgements": 8, "batch_tokens": 512, "train": train, **SMALL_STEPS}
            bench.distill(method, options, seed=1)  # other windows than those of the calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=("stories", "smollm2"))
    parser.add_argument("selected", nargs="*", help="methods, losses, rates, dad; of smollm2: methods")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--refined", type=int, help="steps of the refinement of a block; default: 200, of smollm2 100")
    parser.add_argument("--keep", type=Path, help="folder for text and students, taken up again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        suite = stories if arguments.suite == "stories" else smollm2
        suite(
            folder,
            arguments.steps,
            arguments.refined,
            arguments.selected or ["methods", "losses", "rates", "dad", "dbllm", "gptq-like", "onebit"],
        )


if __name__ == "__main__":
    main()
