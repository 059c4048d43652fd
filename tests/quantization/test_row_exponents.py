"""Weights that float16 scales cannot hold, kept by exponents of their rows: from a recipe to a packed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qcli.export.inspect import inspect
from qcli.export.pack import pack
from qcli.export.verify import verify
from qcli.utils.errors import UnsupportedError, UsageError
from tests.quantizing import logits, run, streamed, write_text
from tests.tiny import tiny_model, with_merge

UP, DOWN = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq-like": {},
    "lcq": {"method__bits": 2, "method__steps": 2},
    "dbllm": {},
    "onebit": {"grouped": False},
}


def unbalanced(tmp_path: Path) -> Path:
    """A model that is a balanced one, function and all: one matrix times 2^24, the next times 2^-24."""
    model = with_merge(tiny_model("llama", tmp_path))
    tensors = load_file(model / "model.safetensors")
    tensors[f"{UP}.weight"] *= 2.0**24
    tensors[f"{DOWN}.weight"] *= 2.0**-24
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("low_rank", [{}, {"low_rank__rank": 2}])
def test_every_method_keeps_weights_of_any_size(method: str, low_rank: dict[str, Any], tmp_path: Path) -> None:
    out, flags = tmp_path / "out", {**METHODS[method], **low_rank, "method__row_exponents": True}
    result = run(unbalanced(tmp_path), out, write_text(tmp_path), method__name=method, **flags)
    assert not any("float16" in note for notes in result.fallbacks.values() for note in notes)
    assert verify(out).bits_per_weight == pytest.approx(result.plan.bits_per_weight)
    errors = {row["name"]: row["error"] for row in inspect(out).layers}
    assert 0 < errors[UP] < 2 * errors["model.layers.1.mlp.up_proj"]
    found = logits(out)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, streamed(out), rtol=1e-3, atol=1e-3)


def test_without_them_large_weights_are_refused_and_small_ones_reported(tmp_path: Path) -> None:
    model = unbalanced(tmp_path)
    with pytest.raises(UsageError, match=f"^{UP}: weights of up to") as refused:
        run(model, tmp_path / "out", method__name="rtn")
    assert "method: {row_exponents: true}" in str(refused.value.hint)
    rules = [{"match": UP, "method": {"row_exponents": True}}]
    result = run(model, tmp_path / "fixed", method__name="rtn", overrides=rules)
    assert list(result.fallbacks) == [DOWN]
    assert "row_exponents: true keeps it" in result.fallbacks[DOWN][0]


def test_packed_as_they_are_or_decoded_and_refused_by_other_layouts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags: dict[str, Any] = {"method__symmetric": True, "method__row_exponents": True}
    run(unbalanced(tmp_path), out, method__name="rtn", **flags)
    for format in ("qcli", "dense"):
        assert pack(out, tmp_path / format, format=format, shard_size=10**9).max_logit_difference == 0
    for format in ("gptq", "compressed-tensors", "gguf"):
        with pytest.raises(UnsupportedError, match="row-scaled"):
            pack(out, tmp_path / format, format=format, shard_size=10**9)
