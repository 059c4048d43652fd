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
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks import common
from qcli.utils import shards
from qcli.utils.files import write_json


class Size(NamedTuple):
    """Of a Llama."""

    hidden: int = 2048
    ffn: int = 8192
    heads: int = 16
    kv_heads: int = 8
    vocab: int = 32000


def write_text(file: Path, tokens: int, vocab: int) -> None:
    """Text of the models' words, a token each."""
    file.write_text(" ".join(f"w{(n * 7919) % vocab}" for n in range(tokens)))


def write_llama(folder: Path, blocks: int, size: Size = Size(), device: str = "cpu") -> int:  # noqa: B008
    """A checkpoint with one shard a block, its weights drawn on `device`; its size in bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocab,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder)
    words = {f"w{n}": n for n in range(size.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment,unused-ignore]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * 0.02).bfloat16().cpu()

    weight_map: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        shards.write_tensors(folder / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))

    hidden, ffn, kv = size.hidden, size.ffn, size.hidden // size.heads * size.kv_heads
    embedding = {"model.embed_tokens.weight": random(size.vocab, hidden), "model.norm.weight": random(hidden)}
    write("outside.safetensors", embedding)
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden)}
    shapes |= {"self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        tensors = {f"{prefix}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden).bfloat16()
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


PLANS: dict[str, tuple[str, int, list[str]]] = {  # method, samples, further settings
    "rtn": ("rtn", 8, []),
    "gptq-like": ("gptq-like", 8, []),
    "gptq-like, 64 samples": ("gptq-like", 64, []),
    "refined": ("rtn", 8, ["--set", "refine.steps=3"]),
    "teq": ("teq", 8, ["--set", "method.steps=3"]),
}
SIZES = ((512, 2048), (1024, 4096), (1536, 6144))
_DISTILLED = ("tables", "weights by blocks")
_LENGTH = 512


def planned(command: list[str]) -> dict[str, Any]:
    """Peak memory of a run on the CPU, and what its plan says beforehand; each in a process of its own."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for more in (["--dry-run"], ["--out", str(Path(folder) / "out")]):
            flags = ["--device", "cpu", "--json", "-q", "--seq-len", str(_LENGTH), *more]
            done = subprocess.run([sys.executable, "-m", "qcli", *command, *flags], stdout=subprocess.PIPE, check=True)
            results.append(json.loads(done.stdout))
    plan, result = results
    estimate = plan["peak_memory_estimate"] if "peak_memory_estimate" in plan else plan["memory"]["peak"]
    peak = result["peak_memory"]["rss"]
    return {
        "peak_rss_gb": round(peak / 1e9, 3),
        "estimate_gb": round(estimate / 1e9, 3),
        "estimate_off": round(estimate / peak - 1, 3),
    }


def compare_plans(cases: list[str]) -> None:
    """The plan's peak against the measured one over three sizes; sequences of 512 tokens."""
    for hidden, ffn in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            model, text, student = Path(folder) / "llama", Path(folder) / "text.txt", Path(folder) / "student"
            write_llama(model, 2, Size(hidden, ffn))
            write_text(text, 40_000, Size().vocab)
            quantized(model, student, "rtn", text)
            for case in cases:
                data = ["--data", str(text), "--samples"]
                if case in PLANS:
                    method, samples, more = PLANS[case]
                    command = ["quantize", str(model), "--method", method, "--bits", "4", *data, str(samples), *more]
                else:
                    command = ["distill", str(student), "--teacher", str(model), *data, "8", "--steps", "2"]
                    blockwise = ["--train", "tables,weights", "--scope", "block"]
                    command += ["--train", "tables"] if case == "tables" else blockwise
                row = {"hidden": hidden, "case": case, **planned(command)}
                print(row, flush=True)
                common.save_row("planned_memory", ("hidden", "case"), row, compare_plans.__doc__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=32, help="32 blocks are 4 GB")
    parser.add_argument("--methods", nargs="+", default=["rtn"], help="of these, gptq-like takes hours at this size")
    parser.add_argument("--plans", nargs="+", choices=[*PLANS, *_DISTILLED], help="compare plans with peaks instead")
    blocks = parser.parse_args()
    if blocks.plans:
        compare_plans(blocks.plans)
        return
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        write_text(text, 3000, Size().vocab)
        for count in (blocks.blocks // 4, blocks.blocks):
            model = Path(folder) / f"llama-{count}"
            write_llama(model, count)
            for method in blocks.methods:
                row = {"blocks": count, **quantized(model, Path(folder) / f"out-{count}-{method}", method, text)}
                print(row, flush=True)
                common.save_row("memory", ("blocks", "method"), row, __doc__)


if __name__ == "__main__":
    main()
