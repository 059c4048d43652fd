"""gptq-like against llm-compressor's GPTQ: python -m benchmarks.versus PEER_PYTHON

Same model (SmolLM2-135M-Instruct as a bf16 folder), same 16 windows of 512 tokens, 3 bits, groups of 64, each arm in a
process of its own, in turn, the peer once in float32 and once in bf16; wall and CPU seconds of the quantization itself,
without imports, loading or saving for the peer. `PEER_PYTHON` is the interpreter of an environment with llmcompressor
(its pins differ from ours): `pip install torch==2.13.0 llmcompressor==0.14.0.1`. `--blocks` cuts the model, to try it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks import common

PEER = """
import json, random, sys, time
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, dtype = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
ids = tokenizer(open(text).read(), add_special_tokens=False)["input_ids"]
draw = random.Random(0)
starts = [draw.randrange(0, len(ids) - 512) for _ in range(16)]
data = Dataset.from_list([{"input_ids": ids[s:s + 512], "attention_mask": [1] * 512} for s in starts])
weights = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
modifier = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
started, cpu = time.perf_counter(), time.process_time()
oneshot(model=model, dataset=data, recipe=modifier, max_seq_length=512, num_calibration_samples=16)
seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
import llmcompressor
print(json.dumps(seconds | {"version": llmcompressor.__version__}))
"""

OURS = """
import json, sys, time
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe
folder, text, out, options = sys.argv[1:5]
flags = {"model": folder, "calibration.data": text, "calibration.samples": 16}
flags |= {"calibration.seq_len": 512, "method.bits": 3, "method.group_size": 64}
recipe, cpu = load_recipe(None, flags | json.loads(options)), time.process_time()
print(json.dumps({"seconds": quantize(recipe, out).seconds, "cpu_seconds": time.process_time() - cpu}))
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, help="only the first ones; the result is then not kept")
    arguments = parser.parse_args()
    text = str(common.assets() / "text" / "wikitext2.valid.detok.txt")
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        model = bf16_folder(Path(folder), arguments.blocks)
        for turn in range(arguments.rounds):
            row = {
                "gptq-like": run(sys.executable, OURS, model, text, f"{folder}/ours-{turn}", "{}"),
                "llm-compressor GPTQ, float32": run(arguments.peer, PEER, model, text, "float32"),
                "gptq-like, plain GPTQ options": run(
                    sys.executable, OURS, model, text, f"{folder}/plain-{turn}", json.dumps(PLAIN)
                ),
                "llm-compressor GPTQ, bfloat16": run(arguments.peer, PEER, model, text, "bfloat16"),
            }
            rounds.append(row)
            print(row, flush=True)
            if arguments.blocks is None:
                common.save("versus-llm-compressor", {"what": __doc__, "rounds": rounds, "ratios": _ratios(rounds)})
        print(json.dumps(_ratios(rounds), indent=1))


def bf16_folder(folder: Path, blocks: int | None) -> str:
    """SmolLM2-135M-Instruct as a bf16 checkpoint in `folder`, all or its first blocks; its path."""
    gguf, model = Path(common.smollm2()), folder / "model"
    script = str(common.assets() / "scripts" / "gguf_to_hf.py")
    subprocess.run([sys.executable, script, str(gguf.parent), gguf.name, str(model)], check=True, stdout=sys.stderr)
    if blocks is not None:
        _cut(model, blocks)
    return str(model)


def _ratios(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Median over the rounds of the seconds of each of our arms over those of each of the peer's."""
    ratios = {}
    for ours in (name for name in rounds[0] if name.startswith("gptq-like")):
        for peer in (name for name in rounds[0] if name.startswith("llm-compressor")):
            pairs = [(row[ours], row[peer]) for row in rounds if "seconds" in row[ours] and "seconds" in row[peer]]
            if pairs:
                ratio = statistics.median(own["seconds"] / other["seconds"] for own, other in pairs)
                ratios[f"{ours} / {peer}"] = round(ratio, 3)
    return ratios


def _cut(model: Path, blocks: int) -> None:
    """Keep the first blocks of a Llama folder."""
    config, file = json.loads((model / "config.json").read_text()), model / "model.safetensors"
    config["num_hidden_layers"] = blocks
    config.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))
    tensors, later = load_file(file), tuple(f"model.layers.{index}." for index in range(blocks, 30))
    save_file({name: t for name, t in tensors.items() if not name.startswith(later)}, file, {"format": "pt"})


if __name__ == "__main__":
    main()
