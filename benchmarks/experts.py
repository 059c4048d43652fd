"""What quantizes and calibrates the experts of a mixture best: python -m benchmarks.experts [--bits N]... [ARM...].

No small mixture of experts with real weights is at hand, so one is made of a real model: stories260k, whose every MLP
becomes eight experts, copies with independent noise, behind a random router. Its text is real, and so are the inputs
of its experts, of which each sees a part. KL is against the mixture itself, on a text that nothing was fitted to.

Rows replace those of the same width and arm in the table, as soon as they are measured.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from benchmarks import common
from qcli.evaluation.evaluate import evaluate
from qcli.evaluation.options import EvalOptions
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe

EXPERTS, CHOSEN, NOISE = 8, 2, 0.3
SAMPLES, LENGTH = 32, 256
ARMS: dict[str, dict[str, Any]] = {
    "rtn": {"method.name": "rtn"},
    "teq": {"method.name": "teq", "method.steps": 100},
    "teq, loss kl": {"method.name": "teq", "method.steps": 100, "method.loss": "kl"},
    "gptq-like, own tokens alone": {"calibration.expert_tokens": 1},
    "gptq-like": {},
    "gptq-like, at least 4 times the inputs": {"calibration.expert_tokens": 256},
    "gptq-like, at least 1,024 tokens": {"calibration.expert_tokens": 1024},
    "gptq-like, all tokens for all experts": {"calibration.all_experts": True},
}


def mixture(folder: Path) -> str:
    """The model, written to `folder`."""
    source = common.assets() / "models" / "stories260k"
    dense: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = dense.config.to_dict()
    for name in ("model_type", "architectures", "head_dim", "transformers_version"):
        config.pop(name, None)
    torch.manual_seed(0)
    config |= {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "router_jitter_noise": 0.0}
    mixed = MixtralForCausalLM(MixtralConfig(**config))
    kept = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    mixed.load_state_dict(kept, strict=False)
    with torch.no_grad():
        for block, origin in zip(mixed.model.layers, dense.model.layers, strict=True):
            mlp: Any = block.mlp
            mlp.gate.weight.normal_()
            both = torch.cat([origin.mlp.gate_proj.weight, origin.mlp.up_proj.weight])
            for stack, weight in (
                (mlp.experts.gate_up_proj, both),
                (mlp.experts.down_proj, origin.mlp.down_proj.weight),
            ):
                stack.copy_(weight + NOISE * weight.std() * torch.randn_like(stack))
    mixed.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Quantize and evaluate the arms; print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of: {'; '.join(ARMS)}")
    parser.add_argument("--bits", type=int, action="append", help="default: 4, 3 and 2")
    given = parser.parse_args()
    texts = common.assets() / "text"
    shared = {"calibration.data": str(texts / "gutenberg-1342.txt"), "calibration.samples": SAMPLES}
    shared |= {
        "calibration.seq_len": LENGTH,
        "method.name": "gptq-like",
        "method.group_size": 32,
        "method.group_tail": "ragged",
    }
    rows: dict[tuple[int, str], dict[str, Any]] = {
        (row["bits"], row["arm"]): row for row in common.kept("experts").get("rows", [])
    }
    with tempfile.TemporaryDirectory() as root:
        model = mixture(Path(root) / "mixture")
        for bits in given.bits or (4, 3, 2):
            for arm in given.arms or ARMS:
                options = ARMS[arm]
                out, started = Path(root) / "out" / f"{bits}-{arm}", time.perf_counter()
                recipe = load_recipe(None, {"model": model, "method.bits": bits} | shared | options)
                result = quantize(recipe, out)
                seconds = time.perf_counter() - started
                measured = EvalOptions([str(texts / "tinyshakespeare.txt")], window=LENGTH, max_windows=64)
                found = evaluate(str(out), measured, baseline=model)
                row: dict[str, Any] = {
                    "bits": bits,
                    "arm": arm,
                    "bits_per_weight": result.plan.bits_per_weight,
                    "seconds": seconds,
                }
                rows[bits, arm] = row | {"kl": found.kl}
                print(rows[bits, arm], flush=True)
                order = sorted(rows, key=lambda key: (-key[0], [*ARMS].index(key[1])))
                settings = {"experts": EXPERTS, "chosen": CHOSEN, "noise": NOISE, "samples": SAMPLES}
                common.save("experts", settings | {"rows": [rows[key] for key in order]})


if __name__ == "__main__":
    main()
