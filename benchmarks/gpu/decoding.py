"""Decoding of a whole model from packed weights, beside bf16: a Llama of 8 billion random weights made on the GPU.

A step is the forward pass of one token with a static cache, captured in a CUDA graph; arms take turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.gpu.layers import FORMATS
from benchmarks.gpu.machine import DEVICE, TINY, Calls, clear, save
from qcli.core.weight import Format
from qcli.inference.linear import QuantLinear

CONTEXT = 512


def llama() -> LlamaForCausalLM:
    """The shape of Llama 3 8B, or a tiny one."""
    config = LlamaConfig(
        hidden_size=64 if TINY else 4096,
        intermediate_size=128 if TINY else 14336,
        num_hidden_layers=2 if TINY else 32,
        num_attention_heads=4 if TINY else 32,
        num_key_value_heads=2 if TINY else 8,
        vocab_size=256 if TINY else 128256,
        dtype=torch.bfloat16,
    )
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model


def pack(model: nn.Module, format: Format) -> int:
    """Replace the linear layers of all blocks by packed ones with random codes; returns their bytes."""
    total = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        layer = QuantLinear(format, module.in_features, module.out_features).to(DEVICE)
        for suffix, tensor in layer.tensors.items():
            if tensor.dtype == torch.int32:
                tensor.random_(-(1 << 31), (1 << 31) - 1)
            elif tensor.dtype == torch.int8:
                tensor.random_(-127, 128)
            else:
                tensor.fill_(-0.005 if suffix == "alpha2" else 0.01)
            total += tensor.nbytes
        model.set_submodule(name, layer)
    return total


def step_of(model: LlamaForCausalLM) -> Callable[[], Tensor]:
    """A function that decodes the token at position 127 with a static cache, again and again."""
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
    prompt = torch.randint(0, model.config.vocab_size, (1, 127), device=DEVICE)
    model(prompt, past_key_values=cache, position_ids=torch.arange(127, device=DEVICE)[None])
    token, place = prompt[:, :1].clone(), torch.tensor([[127]], device=DEVICE)
    mask = torch.zeros(1, 1, 1, CONTEXT, device=DEVICE, dtype=torch.bfloat16)
    mask[..., 128:] = torch.finfo(torch.bfloat16).min
    layers: list[Any] = [layer for layer in cache.layers if hasattr(layer, "cumulative_length")]
    kept = [torch.as_tensor(layer.cumulative_length).clone() for layer in layers]

    def step() -> Tensor:
        for layer, length in zip(layers, kept, strict=True):
            layer.cumulative_length.copy_(length)
        logits: Tensor = model(token, past_key_values=cache, position_ids=place, attention_mask=mask).logits
        return logits

    return step


def measure(formats: list[str], rounds: int) -> None:
    results: list[dict[str, Any]] = []
    for name in ["bf16", *formats]:
        clear()
        model = llama()
        packed = pack(model, FORMATS[name]) if name != "bf16" else None
        with torch.no_grad():
            step = step_of(model)
            clear()
            loaded = None if TINY else torch.cuda.memory_allocated()
            calls = Calls([step])
            times = [calls.microseconds() for _ in range(rounds)]
        row = {
            "format": name,
            "packed_bytes": packed,
            "loaded_bytes": loaded,
            "ms_per_token": statistics.median(times) / 1000,
            "tokens_per_s": 1e6 / statistics.median(times),
        }
        results.append(row)
        print(row, flush=True)
        save("gpu_decoding", {"context": CONTEXT, "rows": results})
        del model, step, calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default="4 bits,3 bits,2 bits,lcq 2 bits,dbllm,onebit")
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    measure(given.formats.split(","), given.rounds)


if __name__ == "__main__":
    main()
