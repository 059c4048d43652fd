"""Quantized weights as parameters: where training starts, what it sees, and its gradients."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from torch import Tensor

from qcli.algorithms.solvers import grid
from qcli.algorithms.training.trainable_weight import TrainableWeight, TrainableWeights, parameter_groups
from qcli.core.formats.affine import Affine, ZeroPoint
from qcli.core.formats.dual_binary import DualBinary
from qcli.core.formats.low_rank import LowRank
from qcli.core.formats.sign import Sign
from qcli.core.weight import Format, QuantizedWeight
from tests.algorithms.tensors import normal

OUT, IN = 12, 64
FORMATS = [
    Affine(bits=bits, group_size=group_size, zero_point=zero_point)
    for bits, group_size in ((2, 16), (3, 64), (4, -1))
    for zero_point in ("none", "integer", "float")
]


def rounded(weight: Tensor, format: Affine) -> QuantizedWeight:
    codes, tables = grid.round_to_minmax(weight, format)
    return QuantizedWeight(format, (weight.shape[0], weight.shape[1]), codes, tables)


def nearest(weight: Tensor, format: Format) -> QuantizedWeight:
    """A weight in any of these formats."""
    if isinstance(format, Affine):
        return rounded(weight, format)
    if isinstance(format, Sign):
        size = weight.abs().mean().sqrt()
        tables = {"in_scale": size.expand(IN).half(), "out_scale": size.expand(OUT, 1).half()}
    else:
        assert isinstance(format, DualBinary)
        size = format.grouped(weight).abs().mean(-1)
        tables = {"alpha1": (1.5 * size).half(), "alpha2": -size.half()}
    return QuantizedWeight(format, (weight.shape[0], weight.shape[1]), format.encode(weight, tables), tables)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_training_starts_exactly_at_the_codes(format: Affine) -> None:
    weight = normal(OUT, IN)
    initial = rounded(weight, format)
    trainable = TrainableWeight(initial, weight + 0.3 * normal(OUT, IN, seed=3), ("tables", "weights"))
    assert torch.equal(trainable.quantized().codes, initial.codes)
    assert torch.equal(trainable.dense(as_stored=True), initial.dense())
    torch.testing.assert_close(trainable.dense(as_stored=False), initial.dense(), rtol=0, atol=1e-6)


def test_training_sees_tables_as_they_will_be_stored() -> None:
    """Tables are rounded on the way, those of 8 bits too, and their gradient passes the rounding."""
    base = Affine(bits=2, group_size=16, zero_point="float")
    format = LowRank.around(base, 2, 8)
    a, b = 0.01 * normal(OUT, 2, seed=5), 0.1 * normal(2, IN, seed=6)
    initial = format.wrap(rounded(normal(OUT, IN), base), format.round_factor("a", a) | format.round_factor("b", b))
    trainable = TrainableWeight(initial, initial.dense(), ("tables",))
    with torch.no_grad():
        for change in trainable.table_changes.values():
            change += 0.05 * normal(*change.shape, seed=8)
    dense = trainable.dense(as_stored=False)
    assert torch.equal(dense, trainable.quantized().dense())
    assert not torch.equal(dense, initial.dense())
    dense.square().sum().backward()
    changes = trainable.table_changes
    assert changes.keys() == {"weight_scale", "weight_zero_point", "lowrank_a", "lowrank_b"}
    assert all(change.grad is not None and bool(change.grad.any()) for change in changes.values())


def test_latents_start_at_the_target_or_well_inside_their_codes() -> None:
    """Inside where the target has another code, as error feedback leaves it."""
    weight, format = normal(OUT, IN), Affine(bits=3, group_size=64)
    initial = rounded(weight, format)
    scale = format.spread(initial.tables["weight_scale"].float(), IN)
    zero_point = format.spread(initial.tables["weight_zero_point"].float(), IN)
    target = weight + 0.6 * scale * (normal(OUT, IN, seed=5) > 1)
    trainable = TrainableWeight(initial, target, ("weights",))
    assert trainable.latents is not None
    latents, exact = trainable.latents.detach(), target / scale + zero_point
    offset = exact - initial.codes
    inside, beyond = offset.abs() < 0.49, offset.abs() > 0.5
    assert bool(inside.any()) and bool(beyond.any())
    torch.testing.assert_close(latents[inside], exact[inside], rtol=1e-5, atol=1e-5)
    expected = initial.codes + 0.35 * offset.sign()
    torch.testing.assert_close(latents[beyond], expected[beyond])


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradient_of_tables_is_that_of_decoding_at_fixed_codes(format: Affine) -> None:
    weight = normal(OUT, IN)
    initial, gradient = rounded(weight, format), normal(OUT, IN, seed=4)
    trainable = TrainableWeight(initial, weight, ("tables", "weights"))
    (trainable.dense(as_stored=False) * gradient).sum().backward()
    scale = initial.tables["weight_scale"].float()
    zero_point = initial.tables["weight_zero_point"].float() if format.zero_point != "none" else format.center
    zero_points = format.spread(zero_point, IN) if isinstance(zero_point, Tensor) else zero_point
    of_scale = format.grouped((initial.codes.float() - zero_points) * gradient).sum(-1)
    expected = of_scale * trainable.table_units["weight_scale"]
    torch.testing.assert_close(trainable.table_changes["weight_scale"].grad, expected, rtol=1e-4, atol=1e-5)
    if isinstance(zero_point, Tensor) and format.zero_point == "float":
        of_zero_point = -(format.grouped(gradient).sum(-1) * scale) * trainable.table_units["weight_zero_point"]
        found = trainable.table_changes["weight_zero_point"].grad
        torch.testing.assert_close(found, of_zero_point, rtol=1e-4, atol=1e-5)
    assert trainable.latents is not None
    torch.testing.assert_close(trainable.latents.grad, gradient * format.spread(scale, IN))


def test_latents_far_beyond_the_last_code_get_no_gradient() -> None:
    format = Affine(bits=2, group_size=-1)
    trainable = TrainableWeight(rounded(normal(OUT, IN), format), None, ("weights",))
    latents = trainable.latents
    assert latents is not None
    with torch.no_grad():
        latents[:, :6] = torch.tensor([-1.1, -0.9, 0.2, 3.3, 3.9, 4.1])
    trainable.dense(as_stored=False).sum().backward()
    assert latents.grad is not None
    assert (latents.grad[0, :6] != 0).tolist() == [False, True, True, True, True, False]


def test_latents_of_signs_are_trained_as_in_onebits_code() -> None:
    """With the paper's norm: start at `0.01 sign(W)`, gradient `1.001 - tanh(w)^2`; without it, our own choices."""
    weight, gradient = 0.04 * normal(OUT, IN), normal(OUT, IN, seed=1)
    tables = {"in_scale": torch.full((IN,), 0.2).half(), "out_scale": 0.1 + normal(OUT, 1, seed=2).abs().half()}
    paper = Sign(output_norm=True)
    initial = QuantizedWeight(paper, (OUT, IN), paper.encode(weight, tables), tables)
    magnitude = initial.dense().abs()
    trainable = TrainableWeight(initial, weight, ("weights",))
    assert trainable.latents is not None
    torch.testing.assert_close(2 * trainable.latents.detach(), 0.01 * weight.sign())
    with torch.no_grad():
        trainable.latents.add_(gradient.roll(1) / 2)
    latent = 0.01 * weight.sign() + gradient.roll(1)
    dense = trainable.dense(as_stored=False)
    torch.testing.assert_close(dense, magnitude * latent.sign())
    (dense * gradient).sum().backward()
    expected = gradient * 2 * magnitude * (1.001 - latent.tanh() ** 2)
    torch.testing.assert_close(trainable.latents.grad, expected, rtol=1e-3, atol=1e-6)
    plain = TrainableWeight(dataclasses.replace(initial, format=Sign()), normal(OUT, IN, seed=3), ("weights",))
    assert plain.latents is not None
    assert bool((2 * plain.latents.detach().abs() > 0.5).any())


def test_tables_and_latents_train_at_their_own_rates() -> None:
    initial = rounded(normal(OUT, IN), Affine(bits=3, group_size=16))
    both, tables = (TrainableWeights({"w": initial}, None, train) for train in (("tables", "weights"), ("tables",)))
    groups = parameter_groups([both, tables], tables_lr=1e-3, weights_lr=1e-2)
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(2, 1e-3), (1, 1e-2)]
    assert len(parameter_groups([tables], tables_lr=1e-3, weights_lr=1e-2)) == 1


TOGETHER: list[Format] = [
    *(Affine(bits=3, group_size=24, zero_point=zero_point) for zero_point in get_args(ZeroPoint)),
    DualBinary(group_size=24),
]


@pytest.mark.parametrize("train", [("tables",), ("weights",), ("tables", "weights")], ids="+".join)
@pytest.mark.parametrize("format", TOGETHER, ids=str)
def test_layers_trained_as_one_are_trained_as_each_alone(format: Format, train: tuple[str, ...]) -> None:
    """Of several widths, with shorter last groups: the same weights and gradients, to the last bit."""
    shapes = {"a": (OUT, IN), "b": (5, IN), "c": (OUT, 48)}
    originals = {path: normal(*shape, seed=number) for number, (path, shape) in enumerate(shapes.items())}
    initial = {path: nearest(weight, format) for path, weight in originals.items()}
    layers = TrainableWeights(initial, originals, train)
    alone = {path: TrainableWeight(weight, originals[path], train) for path, weight in initial.items()}
    assert len(layers.parts) == 1
    for number in range(2):
        dense = layers.dense(as_stored=False)
        torch.stack([(weight * normal(*weight.shape, seed=9)).sum() for weight in dense.values()]).sum().backward()
        for path, layer in alone.items():
            own = layer.dense(as_stored=False)
            (own * normal(*own.shape, seed=9)).sum().backward()
            assert torch.equal(own, dense[path])
            assert torch.equal(layers.dense(as_stored=True)[path], layer.quantized().dense())
            found, expected = layers.quantized()[path], layer.quantized()
            assert torch.equal(found.codes, expected.codes)
            assert all(torch.equal(found.tables[name], table) for name, table in expected.tables.items())
        if number == 0:
            for parameters in [layers.parameters(), *(layer.parameters() for layer in alone.values())]:
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.data -= 0.1 * parameter.grad.sign()
                        parameter.grad = None


def test_layers_of_other_formats_are_trained_alone() -> None:
    weight = normal(OUT, IN)
    initial = {"a": nearest(weight, Affine(bits=3, group_size=16)), "b": nearest(weight, Affine(bits=2, group_size=16))}
    layers = TrainableWeights(
        {**initial, "c": nearest(weight, Sign()), "d": nearest(weight, Sign())}, None, ("tables",)
    )
    assert len(layers.parts) == 4
    assert all(torch.equal(layers.dense(as_stored=False)[path], weight.dense()) for path, weight in initial.items())
    assert layers.dense(as_stored=False, dtype=torch.bfloat16)["c"].dtype == torch.bfloat16
