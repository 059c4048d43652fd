"""What TEQ is best trained for: python -m benchmarks.teq_losses

stories260k in 3 bits a row: channel scales trained for the outputs of blocks, for the predictions of the
full-precision model (KL), or for the text (cross-entropy, the paper's), 100 and 1000 steps, with the gradient through
the range of a row; and 100 steps with the paper's straight-through one. Trained on 64 windows of 256 tokens that the
model has written, scored by KL and perplexity on 40 others.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common
from qcli.evaluation.evaluate import evaluate
from qcli.evaluation.options import EvalOptions
from qcli.quantization.calibrate import calibrate
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe

LENGTH = 256
LOSSES = ("block", "kl", "cross-entropy")


def rows() -> dict[str, dict[str, Any]]:
    """Method options by name of the row."""
    found: dict[str, dict[str, Any]] = {"rtn": {"name": "rtn"}}
    for gradient, budget in (("range", (100, 1000)), ("straight-through", (100,))):
        for loss in LOSSES:
            for steps in budget:
                options = {"loss": loss, "steps": steps, "gradient": gradient}
                found[f"teq, {loss}, {steps} steps, {gradient} gradient"] = {"name": "rtn", "teq": options}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name has a match of this pattern")
    only = parser.parse_args().only
    model = str(common.assets() / "models" / "stories260k")
    with tempfile.TemporaryDirectory() as folder:
        written = {}
        for name, samples, seed in (("trained", 64, 0), ("scored", 40, 1000)):
            fields = {"model": model, "calibration.data": "self", "calibration.seq_len": LENGTH}
            recipe = load_recipe(None, fields | {"calibration.samples": samples, "seed": seed})
            calibrate(recipe, Path(folder) / name)
            written[name] = f"{folder}/{name}"
        asked = {name: options for name, options in rows().items() if re.search(only, name)}
        for number, (name, options) in enumerate(asked.items()):
            transforms = [{"name": "teq", **options["teq"]}] if "teq" in options else []
            fields = {"model": model, "transforms": transforms, "dtype": "float32"}
            fields |= {"method.name": options["name"], "method.bits": 3, "method.group_size": -1}
            fields |= {"calibration.data": written["trained"], "calibration.samples": 64}
            out = f"{folder}/{number}"
            result = quantize(load_recipe(None, fields | {"calibration.seq_len": LENGTH}), out)
            found = evaluate(out, EvalOptions([written["scored"]], window=LENGTH), baseline=model)
            (score,) = found.scores.values()
            row = {"name": name, "bits_per_weight": found.bits_per_weight, "kl": found.kl}
            row |= {"perplexity": score.perplexity, "baseline_perplexity": score.baseline_perplexity}
            print(f"{name:60} KL {found.kl:.4f} ppl {score.perplexity:.3f} {result.seconds:.0f} s", flush=True)
            common.save_row("teq-losses", ("name",), row | {"seconds": round(result.seconds, 1)}, __doc__)


if __name__ == "__main__":
    main()
