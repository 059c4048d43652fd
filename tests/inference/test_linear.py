"""QuantLinear: choice of backends, gradients, copies, compilation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qcli.core.formats.affine import Affine
from qcli.core.formats.low_rank import LowRank
from qcli.core.formats.sign import Sign
from qcli.core.weight import Format
from qcli.inference.linear import QuantLinear
from tests.inference.weights import FORMATS, random_weight

SHAPE = (48, 96)


def quant_linear(format: Format, bias: Tensor | None = None) -> tuple[QuantLinear, Tensor]:
    weight = random_weight(format, SHAPE)
    layer = QuantLinear(format, SHAPE[1], SHAPE[0], bias)
    layer.load_state_dict(format.to_stored(weight) | ({} if bias is None else {"bias": bias}))
    return layer, weight.dense()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradients_flow_to_the_input(format: Format) -> None:
    layer, dense = quant_linear(format)
    x, seen = inputs(2, 3, 96).requires_grad_(), inputs(2, 3, 48)
    (layer(x) * seen).sum().backward()
    torch.testing.assert_close(x.grad, seen @ dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", [Affine(bits=3, group_size=32), LowRank.around(Sign(), 4, 8)], ids=str)
def test_copies_and_pickles_compute_the_same(format: Format) -> None:
    layer, dense = quant_linear(format, bias=inputs(48))
    x = inputs(4, 96)
    expected = F.linear(x, dense, layer.bias)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(other.state_dict()[name], value) for name, value in layer.state_dict().items())


@pytest.mark.slow
def test_torch_compile_has_no_graph_break() -> None:
    layer, _ = quant_linear(Affine(bits=4, group_size=32))
    x = inputs(2, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_the_operator_is_sound() -> None:
    layer, _ = quant_linear(Affine(bits=2, group_size=32))
    spec = '{"bits": 2, "format": "affine", "group_size": 32, "zero_point": "integer"}'
    arguments = (inputs(2, 96).requires_grad_(), list(layer.tensors.values()), None, spec, [48, 96])
    torch.library.opcheck(torch.ops.qcli.linear.default, arguments, test_utils=("test_schema", "test_faketensor"))
