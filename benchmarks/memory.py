"""Peak memory does not grow with depth: python -m benchmarks.memory

Writes a Llama of random weights shard by shard (bf16; 4 GB by default), quantizes it in a fresh process and notes that
process's peak resident memory; and does the same with a quarter of the blocks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks import common
from qcli.utils import shards
from qcli.utils.files import write_json

HIDDEN, FFN, VOCAB = 2048, 8192, 32000


def write_llama(folder: Path, blocks: int) -> int:
    """A checkpoint with one shard a block; its size in bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=VOCAB,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder)
    words = {f"w{n}": n for n in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment,unused-ignore]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    weight_map: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        shards.write_tensors(folder / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))

    write(
        "outside.safetensors", {"model.embed_tokens.weight": random(VOCAB, HIDDEN), "model.norm.weight": random(HIDDEN)}
    )
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN)}
    shapes |= {"self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    shapes |= {"mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN)}
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        tensors = {f"{prefix}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        write(f"block-{block:05d}.safetensors", tensors)
    write_json(folder / shards.INDEX, {"metadata": {}, "weight_map": weight_map})
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def quantized(model: Path, out: Path, method: str, text: Path) -> dict[str, Any]:
    """What `qcli quantize` reports, in a process of its own."""
    command = [str(Path(sys.executable).parent / "qcli"), "quantize", str(model), "--method", method, "--bits", "4"]
    command += ["--data", str(text), "--samples", "2", "--seq-len", "128", "--out", str(out), "--json", "-q"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return {
        "method": method,
        "source_gb": round(result["source_bytes"] / 1e9, 2),
        "written_gb": round(result["bytes"] / 1e9, 2),
        "peak_rss_gb": round(result["peak_memory"]["rss"] / 1e9, 2),
        "seconds": round(result["seconds"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=32, help="32 blocks are 4 GB")
    parser.add_argument("--methods", nargs="+", default=["rtn"], help="of these, gptq-like takes hours at this size")
    blocks = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(" ".join(f"w{(n * 7919) % VOCAB}" for n in range(3000)))
        for count in (blocks.blocks // 4, blocks.blocks):
            model = Path(folder) / f"llama-{count}"
            write_llama(model, count)
            for method in blocks.methods:
                row = {"blocks": count, **quantized(model, Path(folder) / f"out-{count}-{method}", method, text)}
                print(row, flush=True)
                common.save_row("memory", ("blocks", "method"), row, __doc__)


if __name__ == "__main__":
    main()
