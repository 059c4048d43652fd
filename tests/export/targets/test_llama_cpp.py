"""GGUF files in llama.cpp itself, where llama-cpp-python is installed: it computes what qcli computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcli.export.pack import pack
from tests.quantizing import TOKENS, run, streamed
from tests.tiny import tiny_model, with_merge

llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {},
    "dots1": {},
    "glm4_moe": {},
    "mixtral": {},
    "olmoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {"norm_topk_prob": True},
}


def in_llama_cpp(file: Path) -> torch.Tensor:
    """Logits of `TOKENS`."""
    model = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    logits = []
    for row in TOKENS.tolist():
        model.reset()
        model.eval(row)
        logits.append(np.array(model.scores[: len(row)]))
    return torch.from_numpy(np.stack(logits))


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """KL of every token, in nats."""
    return (expected.softmax(-1) * (expected.log_softmax(-1) - actual.log_softmax(-1))).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODELS)
def test_llama_cpp_computes_what_qcli_computes(model_type: str, tmp_path: Path) -> None:
    model = with_merge(tiny_model(model_type, tmp_path, **MODELS[model_type]))
    run(model, tmp_path / "native", method__name="rtn", method__symmetric=True)
    pack(tmp_path / "native", tmp_path / "packed", format="gguf", shard_size=10**9)
    off = divergence(streamed(tmp_path / "native"), in_llama_cpp(tmp_path / "packed" / "model.gguf"))
    # llama.cpp rounds activations to 8 bits, after which a token may go to another expert.
    assert 0 < off.median() < 5e-4 and off.mean() < 5e-3
