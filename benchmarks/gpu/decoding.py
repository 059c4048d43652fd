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

from benchmarks.common import save
from benchmarks.gpu.layers import FORMATS, graph_of, microseconds
from qcli.core.weight import Format
from qcli.inference.linear import QuantLinear

CONTEXT = 512


def llama(device: str, small: bool) -> LlamaForCausalLM:
    """The shape of Llama 3 8B, or a tiny one."""
    config = LlamaConfig(
        hidden_size=64 if small else 4096,
        intermediate_size=128 if small else 14336,
        num_hidden_layers=2 if small else 32,
        num_attention_heads=4 if small else 32,
        num_key_value_heads=2 if small else 8,
        vocab_size=256 if small else 128256,
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model


def pack(model: nn.Module, format: Format, device: str) -> int:
    """Replace the linear layers of all blocks by packed ones with random codes; returns their bytes."""
    total = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        layer = QuantLinear(format, module.in_features, module.out_features).to(device)
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


def step_of(model: LlamaForCausalLM, device: str) -> Callable[[], Tensor]:
    """A function that decodes the token at position 127 with a static cache, again and again."""
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
    prompt = torch.randint(0, model.config.vocab_size, (1, 127), device=device)
    model(prompt, past_key_values=cache, position_ids=torch.arange(127, device=device)[None])
    token, place = prompt[:, :1].clone(), torch.tensor([[127]], device=device)
    mask = torch.zeros(1, 1, 1, CONTEXT, device=device, dtype=torch.bfloat16)
    mask[..., 128:] = torch.finfo(torch.bfloat16).min
    layers: list[Any] = [layer for layer in cache.layers if hasattr(layer, "cumulative_length")]
    kept = [torch.as_tensor(layer.cumulative_length).clone() for layer in layers]

    def step() -> Tensor:
        for layer, length in zip(layers, kept, strict=True):
            layer.cumulative_length.copy_(length)
        logits: Tensor = model(token, past_key_values=cache, position_ids=place, attention_mask=mask).logits
        return logits

    return step


def measure(device: str, small: bool, formats: list[str], rounds: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for name in ["bf16", *formats]:
        model = llama(device, small)
        packed = pack(model, FORMATS[name], device) if name != "bf16" else None
        with torch.no_grad():
            step = step_of(model, device)
            if device == "cpu":
                print(name, step().shape)
                continue
            torch.cuda.empty_cache()
            loaded = torch.cuda.memory_allocated()
            graph = graph_of([step])
            times = [microseconds(graph, 1) for _ in range(rounds)]
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
        del model, step, graph
        torch.cuda.empty_cache()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--formats", default="4 bits,3 bits,2 bits,lcq 2 bits,dbllm,onebit")
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    measure(given.device, given.small, given.formats.split(","), given.rounds)


if __name__ == "__main__":
    main()
