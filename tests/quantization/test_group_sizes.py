"""Groups of up to 1,024 weights: in every method, format and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Method
from qcli.algorithms.methods.dbllm import DBLLM
from qcli.algorithms.methods.gptq_like import GPTQLike
from qcli.algorithms.methods.lcq import LCQ
from qcli.algorithms.methods.rtn import RTN
from qcli.export.pack import pack
from qcli.export.verify import verify
from qcli.utils.errors import UnsupportedError
from tests.algorithms.tensors import normal
from tests.core.formats.checks import round_trip
from tests.quantizing import logits, run, streamed
from tests.tiny import tiny_model, with_merge

METHODS: list[type[Method]] = [RTN, GPTQLike, LCQ, DBLLM]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group_size", [128, 256, 512, 1024])
def test_methods_make_as_many_groups_as_asked(method: type[Method], group_size: int) -> None:
    weight, inputs = normal(8, 1024), normal(1200, 1024, seed=1)
    hessian = inputs.T @ inputs / len(inputs)
    options = {"group_size": group_size} | ({} if method is DBLLM else {"bits": 3})
    built = method.model_validate(options)
    assert built.unsupported_reason((8, 1024)) is None
    quantized = built.quantize(LinearGroup({"w": weight}, hessian, hessian))["w"].weight
    quantized.check()
    round_trip(quantized)
    groups = 1024 // group_size
    assert {table.shape[1] for table in quantized.tables.values() if table.shape[0] == 8} >= {groups}
    error = (quantized.dense() - weight).square().mean() / weight.square().mean()
    assert float(error) < (0.35 if method is DBLLM else 0.12)


@pytest.mark.parametrize("format", ["qcli", "dense", "gguf", "gptq", "compressed-tensors"])
def test_targets_store_long_groups(format: str, tmp_path: Path) -> None:
    """`pack` reads back what it wrote."""
    model = with_merge(tiny_model("llama", tmp_path, hidden_size=256, intermediate_size=512))
    out = tmp_path / "out"
    run(model, out, method__name="rtn", method__group_size=256, method__symmetric=True)
    assert pack(out, tmp_path / "packed", format=format, shard_size=10**9).max_logit_difference == 0


def test_groups_longer_than_rows(tmp_path: Path) -> None:
    """Whole rows, except in the layer that is long enough; layouts with one group size for all layers refuse."""
    model = tiny_model("llama", tmp_path, intermediate_size=1024)
    out = tmp_path / "out"
    flags: dict[str, Any] = {"method__name": "rtn", "method__group_tail": "ragged", "method__symmetric": True}
    run(model, out, method__group_size=512, **flags)
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)
    assert verify(out).layers == 14
    pack(out, tmp_path / "packed", format="compressed-tensors", shard_size=10**9)
    with pytest.raises(UnsupportedError, match="has another format than"):
        pack(out, tmp_path / "gptq", format="gptq", shard_size=10**9)
