"""TEQ: its gradients, what it trains, and that the result is never worse than no transform."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from qcli.algorithms.solvers import grid
from qcli.algorithms.training.loop import Weights
from qcli.algorithms.transform import ChannelScale
from qcli.algorithms.transforms.teq import TEQ, _Transformed
from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import Codebook
from qcli.core.weight import Format
from tests.algorithms.tensors import normal

W3 = Affine(bits=3, group_size=16)
FORMATS = [
    W3,
    Affine(bits=3, group_size=-1),
    Affine(bits=2, group_size=12),
    Affine(bits=4, group_size=16, zero_point="none"),
]


def quantized(weight: Tensor, format: Affine) -> Tensor:
    return format.decode(*grid.round_to_minmax(weight, format))


class Layers:
    """Two linears in a row, `up` then `down`, input channels of unequal size; an `Objective` of their output.

    One scale lies between a norm and `up`, the other between `up` and `down`.
    """

    def __init__(self, tokens: int = 96) -> None:
        self.weights = {
            "up": normal(48, 32, seed=1),
            "down": normal(24, 48, seed=2),
        }
        sizes = torch.exp(normal(32, seed=3))
        self.inputs = normal(2 * tokens, 32, seed=4) * sizes
        self.tokens = tokens
        self.scales = [
            ChannelScale("norm", ("up",), torch.arange(32), torch.arange(32), 32),
            ChannelScale("up", ("down",), torch.arange(48), torch.arange(48), 48),
        ]

    def output(self, weights: Weights, inputs: Tensor) -> Tensor:
        return inputs @ weights["up"].T @ weights["down"].T

    def error(self, weights: Weights, inputs: Tensor) -> Tensor:
        target = self.output(self.weights, inputs)
        return (self.output(weights, inputs) - target).square().mean() / target.square().mean()

    def loss(self, weights: Weights, step: int) -> Tensor:
        return self.error(weights, self.inputs[: self.tokens])

    def held_out(self, weights: Weights) -> float:
        return float(self.error(weights, self.inputs[self.tokens :]))


def folded_error(layers: Layers, alphas: list[Tensor], formats: Mapping[str, Format | None]) -> float:
    """Held-out error with the alphas folded into weights and inputs."""
    first, second = alphas
    up, down = layers.weights["up"] * first / second[:, None], layers.weights["down"] * second
    weights = {"up": up, "down": down}
    for path, format in formats.items():
        if isinstance(format, Affine):
            weights[path] = quantized(weights[path], format)
    inputs = layers.inputs[layers.tokens :]
    target = layers.output(layers.weights, inputs)
    return float((layers.output(weights, inputs / first) - target).square().mean() / target.square().mean())


def with_random_alphas(layers: Layers, formats: Mapping[str, Format | None], *, through_range: bool) -> _Transformed:
    transformed = _Transformed(layers.weights, formats, layers.scales, through_range=through_range)
    for number, theta in enumerate(transformed.thetas):
        theta.data = 0.4 * normal(*theta.shape, seed=number)
    return transformed


def test_straight_through_gradient_is_the_papers() -> None:
    """`dL/dalpha_j = 1/alpha_j sum_t x'_tj <delta_t, W'_:j - Q(W')_:j>`, with `x' = x / alpha`, `W' = W * alpha`."""
    layers = Layers()
    layers.scales.pop()
    transformed = with_random_alphas(layers, {"up": W3}, through_range=False)
    theta, weight, x = transformed.thetas[0], layers.weights["up"], layers.inputs
    delta = normal(len(x), len(weight), seed=9)
    loss = (delta * (x @ transformed.effective(False)["up"].T)).sum()
    (gradient,) = torch.autograd.grad(loss, theta)

    alpha = theta.detach().exp()
    error = weight * alpha - quantized(weight * alpha, W3)
    expected = torch.stack(
        [sum(x[t, j] / alpha[j] * (delta[t] @ error[:, j]) for t in range(len(x))) / alpha[j] for j in range(32)]
    )
    torch.testing.assert_close(gradient / alpha, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_range_gradient_is_that_of_errors_at_a_fixed_share_of_the_step(format: Affine) -> None:
    """Against finite differences of `W + step(alpha) * share * alpha_out / alpha_in` at fixed shares."""
    layers = Layers()
    weight = layers.weights["up"].double()
    transformed = with_random_alphas(layers, {"up": format}, through_range=True)
    probe = normal(*weight.shape, seed=7)
    gradients = torch.autograd.grad((probe * transformed.effective(False)["up"]).sum(), transformed.thetas)
    log_in, log_out = (theta.detach().double() for theta in transformed.thetas)

    def steps(log_in: Tensor, log_out: Tensor) -> Tensor:
        groups = format.grouped(weight * (log_in - log_out[:, None]).exp())
        symmetric = format.zero_point == "none"
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        return format.spread(torch.maximum(-low, high) if symmetric else high - low, 32)

    scaled = weight * (log_in - log_out[:, None]).exp()
    share = (quantized(scaled.float(), format) - scaled) / steps(log_in, log_out)

    def value(log_in: Tensor, log_out: Tensor) -> float:
        effective = weight + steps(log_in, log_out) * share * (log_out[:, None] - log_in).exp()
        return float((probe * effective).sum())

    for number, gradient in enumerate(gradients):
        for index in range(0, len(gradient), 5):
            ends = []
            for sign in (1e-6, -1e-6):
                moved = [log_in.clone(), log_out.clone()]
                moved[number][index] += sign
                ends.append(value(moved[0], moved[1]))
            assert float(gradient[index]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-4)
    torch.testing.assert_close(gradients[1], torch.zeros(48), rtol=0, atol=1e-4)
    if format.group_size == -1:
        assert abs(float(gradients[0].sum())) < 1e-3, "a common factor of a whole row changes nothing"


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_effective_weights_equal_folded_ones(format: Affine) -> None:
    layers = Layers()
    formats = {"up": format, "down": format}
    transformed = with_random_alphas(layers, formats, through_range=True)
    with torch.no_grad():
        expected = layers.held_out(transformed.effective(True))
        alphas = [theta.exp() for theta in transformed.thetas]
    assert folded_error(layers, alphas, formats) == pytest.approx(
        expected, rel=0.02
    )  # float16 scales round differently


def test_training_lowers_the_held_out_loss() -> None:
    layers = Layers()
    formats = {"up": W3, "down": W3}
    random_state = torch.get_rng_state()
    teq = TEQ(steps=60, lr=1e-2)
    alphas, outcome = teq.fit(layers.weights, formats, layers.scales, layers)
    assert outcome.before == pytest.approx(folded_error(layers, [torch.ones(32), torch.ones(48)], formats), rel=1e-3)
    assert outcome.after < 0.8 * outcome.before
    assert folded_error(layers, alphas, formats) == pytest.approx(outcome.after, rel=0.02)
    again, _ = teq.fit(layers.weights, formats, layers.scales, layers)
    assert all(torch.equal(one, other) for one, other in zip(alphas, again, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_straight_through_training_is_never_worse_than_no_transform() -> None:
    layers = Layers()
    teq = TEQ(steps=60, lr=1e-2, gradient="straight-through")
    formats = {"up": W3, "down": W3}
    alphas, _ = teq.fit(layers.weights, formats, layers.scales, layers)
    untouched = folded_error(layers, [torch.ones(32), torch.ones(48)], formats)
    assert folded_error(layers, alphas, formats) <= 1.01 * untouched  # float16 scales round differently


class Misleading(Layers):
    """Training makes the held-out error larger."""

    def loss(self, weights: Weights, step: int) -> Tensor:
        return -super().loss(weights, step)


@pytest.mark.parametrize("steps", [0, 40])
def test_alphas_stay_1_if_training_does_not_help(steps: int) -> None:
    layers = Misleading()
    alphas, outcome = TEQ(steps=steps, lr=1e-2).fit(layers.weights, {"up": W3, "down": W3}, layers.scales, layers)
    assert all(torch.equal(alpha, torch.ones_like(alpha)) for alpha in alphas)
    assert outcome.after == outcome.before
    assert (outcome.best_step, outcome.steps) == (0, steps)


def test_alphas_of_dense_readers_stay_1() -> None:
    layers = Layers()
    teq = TEQ(steps=20, lr=1e-2)
    alphas, outcome = teq.fit(layers.weights, {"up": W3, "down": None}, layers.scales, layers)
    assert outcome.after < outcome.before
    assert not torch.equal(alphas[0], torch.ones(32))
    assert torch.equal(alphas[1], torch.ones(48))
    for formats in ({}, {"up": None, "down": None}):
        alphas, outcome = teq.fit(layers.weights, formats, layers.scales, layers)
        assert all(torch.equal(alpha, torch.ones_like(alpha)) for alpha in alphas)
        assert (outcome.before, outcome.after, outcome.steps) == (0.0, 0.0, 0)


def test_groups_of_zeros_do_no_harm() -> None:
    layers = Layers()
    layers.weights["up"][3] = 0
    _, outcome = TEQ(steps=10).fit(layers.weights, {"up": W3, "down": W3}, layers.scales, layers)
    assert outcome.steps == 10


def test_formats_without_groups_are_unsupported() -> None:
    class Other(Format):
        name = "other"

    reason = TEQ().unsupported_reason(Other(bits=2))
    assert reason is not None
    assert "cannot prepare layers of the other format" in reason
    assert TEQ().unsupported_reason(W3) is None
    assert TEQ().unsupported_reason(Codebook(bits=2, group_size=16, rank=2, table_bits=8)) is None


def test_training_starts_at_plain_rounding_and_rows_without_an_alpha_stay_there() -> None:
    """As in a fused q/k/v, where only the rows of v have an alpha."""
    layers = Layers()
    outputs = torch.cat([torch.full((16,), -1), torch.arange(32)])
    layers.scales[1] = ChannelScale("up", ("down",), outputs, torch.arange(48) % 32, 32)
    transformed = _Transformed(layers.weights, {"up": W3}, layers.scales, through_range=True)
    with torch.no_grad():
        torch.testing.assert_close(transformed.effective(True)["up"], quantized(layers.weights["up"], W3))
        transformed.thetas[1] += 0.3
        moved = transformed.effective(True)["up"]
    torch.testing.assert_close(moved[:16], quantized(layers.weights["up"], W3)[:16])
    assert not torch.allclose(moved[16:], quantized(layers.weights["up"], W3)[16:])


def test_options_are_validated() -> None:
    for options in ({"steps": -1}, {"lr": 0}, {"loss": "mse"}, {"stepz": 3}):
        with pytest.raises(ValidationError):
            TEQ.model_validate(options)
