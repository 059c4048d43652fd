"""neural-compressor's AWQ, scored as everything else: python -m benchmarks.awq PEER_PYTHON

SmolLM2-135M-Instruct, 16 windows of 512 tokens of WikiText-2 valid, groups of 64, asymmetric, scales and clipping
searched; the dense weights it leaves are saved and scored by our evaluation. `PEER_PYTHON` is the interpreter of an
environment with neural-compressor-pt 3.10 and transformers 4 (its pins differ from ours).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from benchmarks import common
from benchmarks.quality import BLOCKS, full_precision
from qcli.data.tokens import TokenRequest, calibration_tokens
from qcli.evaluation.evaluate import evaluate
from qcli.evaluation.options import EvalOptions
from qcli.models.open import open_source

PEER = """
import json, sys, time
from importlib.metadata import version
import torch
from neural_compressor.torch.quantization import AWQConfig, convert, prepare
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, tokens, bits, blocks, out = sys.argv[1:6]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
model.config.use_cache = False
model.model.layers = model.model.layers[: int(blocks)]  # block by block: what follows changes nothing
model.config.num_hidden_layers = len(model.model.layers)
samples = load_file(tokens)["ids"].split(1)
absorbed = {
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.up_proj": "mlp.down_proj",
}
config = AWQConfig(
    bits=int(bits), group_size=64, use_sym=False, use_auto_scale=True, use_auto_clip=True, folding=True,
    absorb_layer_dict=absorbed,
)
started = time.perf_counter()
with torch.no_grad():
    model = prepare(model, config, example_inputs=samples[0])
    for sample in samples:
        model(sample)
    model = convert(model)
seconds = time.perf_counter() - started
plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
dense = plain.state_dict()
for name, module in model.named_modules():
    weight = module.recover() if hasattr(module, "recover") else getattr(module, "weight", None)
    if weight is not None:
        dense[name + ".weight"] = weight.detach().float()
plain.load_state_dict(dense)
plain.save_pretrained(out)
print(json.dumps({"seconds": round(seconds, 1), "version": version("neural-compressor-pt")}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", help="python of an environment with neural-compressor-pt")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="quantize the first ones only")
    arguments = parser.parse_args()
    blocks = arguments.blocks
    text = common.assets() / "text"
    with tempfile.TemporaryDirectory() as folder:
        model = full_precision(common.smollm2(), Path(folder))
        source, tokens = open_source(model), f"{folder}/tokens.safetensors"
        calibration = text / "wikitext2.valid.detok.txt"
        save_file(
            {"ids": calibration_tokens(TokenRequest(str(calibration), samples=16, seq_len=512, seed=0), source).ids},
            tokens,
        )
        for bits in arguments.bits:
            out = f"{folder}/{bits}"
            done = subprocess.run(
                [arguments.peer, "-c", PEER, model, tokens, str(bits), str(blocks), out],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            source.copy_companions(Path(out))
            score = str(text / "wikitext2.test.detok.txt")
            found = evaluate(out, EvalOptions([score], window=512, max_windows=20), baseline=model)
            (scored,) = found.scores.values()
            row = {
                "name": "neural-compressor AWQ",
                "bits": bits,
                "group_size": 64,
                "samples": 16,
                "blocks": blocks,
                "kl": found.kl,
            }
            row |= {"perplexity": scored.perplexity, **json.loads(done.stdout.strip().splitlines()[-1])}
            print(row, flush=True)
            common.save_row("awq", ("name", "bits", "blocks"), row, __doc__)


if __name__ == "__main__":
    main()
