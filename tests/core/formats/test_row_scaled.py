"""Exponents of rows around every other format: nothing but powers of two is added."""

from __future__ import annotations

import pytest
import torch

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.low_rank import LowRankCompensation
from qcli.algorithms.method import Method
from qcli.algorithms.methods.dbllm import DBLLM
from qcli.algorithms.methods.lcq import LCQ
from qcli.algorithms.methods.onebit import OneBit
from qcli.algorithms.methods.rtn import RTN
from qcli.algorithms.training.trainable_weight import TrainableWeight
from qcli.core.formats.row_scaled import RowScaled
from qcli.core.weight import QuantizedWeight, from_spec
from qcli.inference.linear import QuantLinear
from qcli.quantization.solve import solve
from qcli.utils.errors import VerificationError
from tests.core.formats.checks import drawn, round_trip

METHODS: list[Method] = [
    RTN(bits=3, group_size=16, row_exponents=True),
    RTN(bits=3, group_size=16, symmetric=True, row_exponents=True),
    LCQ(bits=2, group_size=16, row_exponents=True),
    DBLLM(group_size=16, row_exponents=True),
    OneBit(row_exponents=True),
]
LOW_RANK = LowRankCompensation(rank=2)
SIZES = torch.tensor([-120, -30, -14, 0, 7, 90], dtype=torch.int8)


def weight_of(method: Method, low_rank: bool = False) -> QuantizedWeight:
    hessian = torch.eye(48)
    group = LinearGroup({"w": RowScaled.shifted(drawn(6, 48), SIZES)}, hessian, hessian)
    return solve(method, LOW_RANK if low_rank else None, group)["w"].weight


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_holds_of_the_base_holds_of_its_scaled_rows(method: Method, low_rank: bool) -> None:
    weight = weight_of(method, low_rank)
    weight.check()
    assert isinstance(weight.format, RowScaled) and from_spec(weight.format.spec()) == weight.format
    again = round_trip(weight)
    assert all(torch.equal(again.tables[name], table) for name, table in weight.tables.items())
    base = weight.format.base.decode(weight.codes, weight.tables)
    assert torch.equal(weight.dense(), base * 2.0 ** weight.tables["row_exponent"].float()[:, None])
    target = RowScaled.shifted(drawn(6, 48, seed=3), SIZES)
    scaled = target * 2.0 ** -weight.tables["row_exponent"].float()[:, None]
    encoded = weight.format.encode(target, weight.tables)
    assert torch.equal(encoded, weight.format.base.encode(scaled, weight.tables))
    extra = weight.format.bits_per_weight((6, 48)) - weight.format.base.bits_per_weight((6, 48))
    assert extra == pytest.approx(8 / 48)
    rows = weight.format.slice_rows(weight.tables, slice(2, 5))
    torch.testing.assert_close(weight.format.decode(weight.codes[2:5], rows), weight.dense()[2:5])


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_layers_run_and_train(method: Method, low_rank: bool) -> None:
    weight, x = weight_of(method, low_rank), drawn(3, 48, seed=5)
    bias = RowScaled.shifted(drawn(6, seed=6), SIZES)
    linear = QuantLinear(weight.format, 48, 6, bias)
    linear.load_state_dict({**weight.format.to_stored(weight), "bias": bias})
    sizes = 2.0 ** -SIZES.float()
    torch.testing.assert_close(linear(x) * sizes, (x @ weight.dense().T + bias) * sizes, rtol=2e-3, atol=2e-3)
    trained = TrainableWeight(weight, None, ("tables", "weights"))
    assert torch.equal(trained.dense(as_stored=True), weight.dense())
    torch.testing.assert_close(trained.dense(as_stored=False), weight.dense())
    trained.dense(as_stored=False)[1:4].sum().backward()
    assert all(
        bool(parameter.grad.isfinite().all()) for parameter in trained.parameters() if parameter.grad is not None
    )


def test_extreme_rows() -> None:
    """The smallest and the largest float32, and zeros."""
    weight = torch.tensor([[1e-45, 0.0], [3e38, -1e38], [0.0, 0.0], [1.0, 0.5]])
    exponent = RowScaled.exponents(weight)
    assert exponent.tolist() == [-126, 126, 0, 1]
    scaled = RowScaled.shifted(weight, -exponent)
    assert torch.equal(RowScaled.shifted(scaled, exponent), weight)
    assert float(scaled.abs().max()) < 4.0


def test_invalid_specs_and_tables_are_refused() -> None:
    spec = weight_of(METHODS[0]).format.spec()
    for change, message in (
        ({"bits": 4}, "bits is 4, its base has 3"),
        ({"base": spec}, "cannot be the base of another"),
    ):
        with pytest.raises(VerificationError, match=message):
            from_spec(spec | change)
    weight = weight_of(METHODS[0])
    tables = {**weight.tables, "row_exponent": weight.tables["row_exponent"][:2]}
    with pytest.raises(VerificationError, match="row_exponent is"):
        QuantizedWeight(weight.format, weight.shape, weight.codes, tables).check()
