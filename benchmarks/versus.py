"""gptq-like against llm-compressor's GPTQ: python -m benchmarks.versus PEER_PYTHON

Same model (SmolLM2-135M-Instruct as a bf16 folder), same 16 windows of 512 tokens, 3 bits, groups of 64, each arm in a
process of its own, in turn; wall seconds of the quantization itself, without imports, loading or saving for the peer.
`PEER_PYTHON` is the interpreter of an environment with llmcompressor (its pins differ from ours).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common

PEER = """
import json, random, sys, time
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = tokenizer(open(text).read(), add_special_tokens=False)["input_ids"]
draw = random.Random(0)
starts = [draw.randrange(0, len(ids) - 512) for _ in range(16)]
data = Dataset.from_list([{"input_ids": ids[s:s + 512], "attention_mask": [1] * 512} for s in starts])
weights = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
modifier = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
started = time.perf_counter()
oneshot(model=model, dataset=data, recipe=modifier, max_seq_length=512, num_calibration_samples=16)
import llmcompressor
print(json.dumps({"seconds": time.perf_counter() - started, "version": llmcompressor.__version__}))
"""

OURS = """
import json, sys
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe
folder, text, out, options = sys.argv[1:5]
flags = {"model": folder, "calibration.data": text, "calibration.samples": 16}
flags |= {"calibration.seq_len": 512, "method.bits": 3, "method.group_size": 64}
recipe = load_recipe(None, flags | json.loads(options))
print(json.dumps({"seconds": quantize(recipe, out).seconds}))
"""

PLAIN = {
    "method.refit_target": False,
    "method.residual": False,
    "method.refit_tables": False,
    "method.grid": "minmax",
    "method.damping": 0.01,
}


def run(python: str, code: str, *arguments: str) -> dict[str, Any]:
    """The last line of JSON that a process prints, or why there is none."""
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"not_run": done.stderr.strip().splitlines()[-1]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", help="python of an environment with llmcompressor")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    text = str(common.assets() / "text" / "wikitext2.valid.detok.txt")
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(common.smollm2())
        script = str(common.assets() / "scripts" / "gguf_to_hf.py")
        model = f"{folder}/model"
        subprocess.run([sys.executable, script, str(gguf.parent), gguf.name, model], check=True)
        for turn in range(arguments.rounds):
            row = {
                "gptq-like": run(sys.executable, OURS, model, text, f"{folder}/ours-{turn}", "{}"),
                "llm-compressor GPTQ": run(arguments.peer, PEER, model, text),
                "gptq-like, plain GPTQ options": run(
                    sys.executable, OURS, model, text, f"{folder}/plain-{turn}", json.dumps(PLAIN)
                ),
            }
            rounds.append(row)
            print(row, flush=True)
            common.save("versus-llm-compressor", {"what": __doc__, "rounds": rounds})


if __name__ == "__main__":
    main()
