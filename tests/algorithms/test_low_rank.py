"""Low-rank compensation: the best factors there are, and checkpoints that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qcli.algorithms.layer_group import HESSIAN, LinearGroup
from qcli.algorithms.low_rank import LowRankCompensation
from qcli.algorithms.method import Method, Solution
from qcli.algorithms.methods.gptq_like import GPTQLike
from qcli.algorithms.methods.rtn import RTN
from qcli.algorithms.solvers.low_rank import factors, leading_directions, weighted_error
from qcli.core.activations import Activations
from qcli.core.formats.affine import Affine
from qcli.core.formats.low_rank import FactorBits, LowRank
from qcli.core.weight import QuantizedWeight
from qcli.export.inspect import inspect
from qcli.export.pack import pack
from qcli.export.verify import verify
from qcli.models import manifest as checkpoint
from qcli.models.native import NativeSource, quantization_config
from qcli.models.open import open_source
from qcli.models.quantized import stored_tensors
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe
from qcli.utils import shards
from qcli.utils.errors import UnsupportedError, VerificationError
from qcli.utils.files import write_json
from tests.quantizing import logits, streamed
from tests.tiny import tiny_model

BASE = Affine(bits=3, group_size=16, zero_point="integer")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments(inputs: int, seed: int = 1) -> Tensor:
    """Of inputs that differ in size and go together, as a layer's do."""
    x = drawn(4 * inputs, inputs, seed=seed) * torch.logspace(-1.5, 1, inputs) @ drawn(inputs, inputs, seed=seed + 1)
    return x.T @ x / len(x)


def left(error: Tensor, hessian: Tensor | None, rank: int, bits: FactorBits = 16) -> float:
    """The error that factors of this rank leave."""
    format = LowRank.around(BASE, rank, bits)
    return weighted_error(error - format.product(factors(error, hessian, format)), hessian)


def least(error: Tensor, hessian: Tensor, rank: int) -> float:
    """What no factors can undercut: the singular values of `E L` beyond the rank."""
    values, vectors = torch.linalg.eigh(hessian.double())
    singular = torch.linalg.svdvals(error.double() @ (vectors * values.clamp(min=0).sqrt()))
    return float(singular[rank:].square().sum())


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (300, 260)], ids=str)
@pytest.mark.parametrize("rank", [1, 4])
def test_factors_are_the_best_there_are(shape: tuple[int, int], rank: int) -> None:
    """Against the SVD of `E L`; (300, 260) is larger than what the iteration solves exactly."""
    error, hessian = drawn(*shape) * 0.01, moments(shape[1])
    assert left(error, hessian, rank) == pytest.approx(least(error, hessian, rank), rel=1e-3)
    plain = left(error, torch.eye(shape[1]), rank)
    assert plain == pytest.approx(least(error, torch.eye(shape[1]), rank), rel=1e-3)
    assert left(error, None, rank) == pytest.approx(plain)


def test_no_other_factors_near_them_are_better() -> None:
    error, hessian, format = drawn(20, 24) * 0.1, moments(24), LowRank.around(BASE, 3, 16)
    tables = factors(error, hessian, format)
    a, b = format.factor("a", tables), format.factor("b", tables)
    best = weighted_error(error - a @ b, hessian)
    for seed in range(50):
        for size in (1e-2, 1e-1):
            other_a = a + size * a.abs().mean() * drawn(20, 3, seed=seed)
            other_b = b + size * b.abs().mean() * drawn(3, 24, seed=100 + seed)
            assert weighted_error(error - other_a @ other_b, hessian) > best


def test_weights_pay_ranks_pay_and_eight_bits_cost_little() -> None:
    error, hessian = drawn(64, 48) * 0.01, moments(48)
    weighted = [left(error, hessian, rank) for rank in (1, 2, 4, 8, 16)]
    assert weighted == sorted(weighted, reverse=True)
    assert weighted[0] < weighted_error(error, hessian)
    format = LowRank.around(BASE, 8, 16)
    plain = weighted_error(error - format.product(factors(error, None, format)), hessian)
    assert weighted[3] < 0.8 * plain
    assert weighted[3] < left(error, hessian, 8, bits=8) < 1.01 * weighted[3]


def test_hard_cases_have_factors_too() -> None:
    """Dead inputs (a singular H), an error of lower rank than the factors, none at all, and a huge outlier."""
    error, hessian = drawn(24, 20) * 0.01, moments(20)
    dead = hessian.clone()
    dead[3], dead[:, 3] = 0, 0
    assert left(error, dead, 4, bits=8) < weighted_error(error, dead)
    thin = drawn(24, 2) @ drawn(2, 20, seed=3)
    assert left(thin, hessian, 4, bits=16) < 1e-5 * weighted_error(thin, hessian)
    assert left(torch.zeros(24, 20), hessian, 4, bits=8) == 0
    outlier = hessian.clone()
    outlier[5, 5] += 1e6 * float(hessian.diagonal().mean())
    directions, exact = leading_directions(error, outlier, 4), error.double()
    rest = weighted_error(exact - directions @ (directions.T @ exact), outlier.double())
    assert rest == pytest.approx(least(error, outlier, 4), rel=1e-6)
    assert left(error, outlier, 4, bits=8) < 1e-3 * weighted_error(error, outlier)


def test_same_factors_every_time_and_no_global_randomness() -> None:
    error, state = drawn(300, 40), torch.random.get_rng_state()
    first = leading_directions(error, None, 4)
    assert torch.equal(first, leading_directions(error, None, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(first.T @ first, torch.eye(4, dtype=torch.float64))


def solved(method: Method, *, seed: int = 0, **options: Any) -> tuple[LinearGroup, dict[str, Solution]]:
    """Two layers with one input, and what `method` makes of them; the quantized stream differs from the original."""
    inputs = moments(48)
    weights = {"q": drawn(40, 48, seed=seed) * 0.1, "k": drawn(24, 48, seed=seed + 1) * 0.1}
    group = LinearGroup(weights, hessian=inputs, cross=inputs + 0.02 * inputs @ drawn(48, 48, seed=9) / 7)
    return group, method.quantize(group)


@pytest.mark.parametrize("method", [RTN(bits=3, group_size=16), GPTQLike(bits=2, group_size=16)], ids=["rtn", "gptq"])
@pytest.mark.parametrize("weighted", [True, False])
def test_every_method_is_compensated(method: Method, weighted: bool) -> None:
    group, solutions = solved(method)
    low_rank = LowRankCompensation(rank=4, weighted=weighted)
    assert low_rank.needs == ({HESSIAN} if weighted else frozenset())
    found = low_rank.compensate(method, group, solutions)
    for name, before in solutions.items():
        after = found[name]
        assert after.weight.format == low_rank.format(method.format)
        assert (after.target is before.target, after.fallbacks) == (True, before.fallbacks)
        assert torch.equal(after.weight.codes, before.weight.codes)
        after.weight.check()
        aim = group.weights[name] if before.target is None else before.target
        hessian = group.hessian if weighted else None
        error = aim - before.weight.dense()
        assert weighted_error(aim - after.weight.dense(), hessian) < 0.9 * weighted_error(error, hessian)


def test_the_error_against_the_target_or_the_original_weight_is_repaired() -> None:
    method = GPTQLike(bits=2, group_size=16)
    group, solutions = solved(method)
    by_target = LowRankCompensation(rank=4).compensate(method, group, solutions)
    by_weight = LowRankCompensation(rank=4, of="weight").compensate(method, group, solutions)
    for name, weight in group.weights.items():
        target = solutions[name].target
        assert target is not None
        for aim, better, worse in ((target, by_target, by_weight), (weight, by_weight, by_target)):
            assert weighted_error(aim - better[name].weight.dense(), group.hessian) < weighted_error(
                aim - worse[name].weight.dense(), group.hessian
            )


@pytest.mark.parametrize(
    "method", [RTN(bits=2, group_size=16), GPTQLike(bits=2, group_size=16)], ids=["rtn", "gptq-like"]
)
def test_more_rounds_are_never_worse_and_aim_at_the_same_target(method: Method) -> None:
    group, solutions = solved(method)
    errors: dict[str, list[float]] = {name: [] for name in solutions}
    for rounds in (1, 2, 4):
        found = LowRankCompensation(rank=6, rounds=rounds).compensate(method, group, solutions)
        for name, solution in found.items():
            assert solution.target is solutions[name].target
            aim = group.weights[name] if solution.target is None else solution.target
            errors[name].append(weighted_error(aim - solution.weight.dense(), group.hessian))
    for falling in errors.values():
        assert falling == sorted(falling, reverse=True)
        assert falling[-1] < falling[0]


def test_rtn_is_compensated_without_data() -> None:
    method, weight = RTN(bits=3, group_size=16), drawn(40, 48)
    group = LinearGroup({"q": weight})
    solutions = method.quantize(group)
    found = LowRankCompensation(rank=4, weighted=False, rounds=2).compensate(method, group, solutions)
    assert weighted_error(weight - found["q"].weight.dense(), None) < weighted_error(
        weight - solutions["q"].weight.dense(), None
    )


def test_what_cannot_be_compensated_is_named() -> None:
    low_rank = LowRankCompensation(rank=8)
    assert low_rank.misfit((64, 9)) is None
    assert low_rank.misfit((64, 8)) == "low_rank.rank 8 must be below 8, the shorter side of [64, 8]"
    group, solutions = solved(RTN(bits=3, group_size=16))
    weight = solutions["k"].weight
    tables = {**weight.tables, "weight_scale": weight.tables["weight_scale"] * torch.inf}
    solutions["k"].weight = QuantizedWeight(weight.format, weight.shape, weight.codes, tables)
    with pytest.raises(VerificationError, match="k: the quantized weight holds NaN"):
        low_rank.compensate(RTN(bits=3, group_size=16), group, solutions)


# Checkpoints


def assembled(tmp_path: Path, bits: FactorBits = 8, activations: Activations | None = None) -> Path:
    """An rtn checkpoint of a tiny Llama, k_proj dense and up_proj as it was, all else with a low-rank term."""
    model, bare, out = tiny_model("llama", tmp_path), tmp_path / "bare", tmp_path / "out"
    recipe = load_recipe(
        None,
        {"model": str(model), "method.name": "rtn", "method.bits": 3, "method.group_size": 32},
        ["overrides=[{match: '*.k_proj', dense: true}]"],
    )
    quantize(recipe, bare)
    original, source = open_source(str(model)), open_source(str(bare))
    assert isinstance(source, NativeSource)
    formats: dict[str, Any] = dict.fromkeys(layer.name for layer in source.linears())
    tensors = {name: source.read([name])[name] for name in source.tensors()}
    for layer, packed in source.quantized.items():
        weight, true = source.read_quantized(layer), original.read([f"{layer}.weight"])[f"{layer}.weight"]
        if not layer.endswith("up_proj"):
            format = LowRank.around(packed.format, 4, bits)
            weight = format.wrap(weight, factors(true - weight.dense(), None, format))
        formats[layer] = weight.format
        del tensors[f"{layer}.weight"]
        tensors |= stored_tensors(layer, weight)
    out.mkdir()
    shards.write_tensors(out / "model.safetensors", tensors)
    config = quantization_config(source.linears(), formats, activations)
    write_json(out / "config.json", source.config | {"quantization_config": config})
    source.copy_companions(out)
    (out / checkpoint.RECIPE).write_bytes((bare / checkpoint.RECIPE).read_bytes())
    size = {"bits_per_weight": open_source(str(out)).bits_per_weight()}
    checkpoint.Manifest.read(bare).model_copy(update=size).write(out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("activations", [None, Activations(bits=6)], ids=["W", "WA"])
def test_checkpoints_load_evaluate_and_survive(
    bits: FactorBits, activations: Activations | None, tmp_path: Path
) -> None:
    out = assembled(tmp_path, bits, activations)
    packed = logits(out)
    torch.testing.assert_close(streamed(out), packed, rtol=1e-4, atol=1e-4)
    if activations is None:
        true = logits(tmp_path / "llama-0")
        assert float((packed - true).square().mean()) < 0.9 * float((logits(tmp_path / "bare") - true).square().mean())
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), packed)
    assert verify(out).layers == 12
    found = inspect(out)
    assert found.activations == (None if activations is None else activations.model_dump())
    rows = {row["name"].rpartition(".")[2]: row for row in found.layers}
    assert rows["q_proj"]["base"] == {"format": "affine", "bits": 3, "group_size": 32, "zero_point": "integer"}
    assert (rows["q_proj"]["format"], rows["up_proj"]["format"], rows["k_proj"]["format"]) == (
        "low-rank",
        "affine",
        None,
    )


def test_checkpoints_are_packed(tmp_path: Path) -> None:
    out = assembled(tmp_path)
    result = pack(out, tmp_path / "packed", format="qcli", shard_size=100_000)
    assert result.files > 1
    assert result.max_logit_difference == 0
    assert result.bits_per_weight == open_source(str(out)).bits_per_weight()
    pack(out, tmp_path / "dense", format="dense", shard_size=10**9)
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(out), rtol=1e-4, atol=1e-4)


def test_dense_models_cannot_quantize_activations(tmp_path: Path) -> None:
    out = assembled(tmp_path, activations=Activations())
    assert pack(out, tmp_path / "packed", format="qcli", shard_size=10**9).max_logit_difference == 0
    with pytest.raises(UnsupportedError, match="quantizes activations to 8 bits, which a dense model cannot"):
        pack(out, tmp_path / "dense", format="dense", shard_size=10**9)
    assert not list(tmp_path.glob("dense*"))


Q, UP, K = (f"model.layers.1.{path}" for path in ("self_attn.q_proj", "mlp.up_proj", "self_attn.k_proj"))


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        (lambda tensors: tensors.pop(f"{Q}.lowrank_b"), f"{Q}.lowrank_b"),
        (lambda tensors: tensors.pop(f"{Q}.lowrank_a_scale"), f"{Q}.lowrank_a_scale"),
        (lambda tensors: tensors.update({f"{Q}.lowrank_a": tensors[f"{Q}.lowrank_a"].half()}), f"{Q}.lowrank_a"),
        (lambda tensors: tensors.update({f"{Q}.lowrank_a": tensors[f"{Q}.lowrank_a"][:, :3]}), f"{Q}.lowrank_a"),
        (
            lambda tensors: tensors.update({f"{UP}.lowrank_a": torch.zeros(2)}),
            f"{UP}.lowrank_a belongs to no quantized layer",
        ),
        (
            lambda tensors: tensors.update({f"{K}.lowrank_b": torch.zeros(2)}),
            f"{K}.lowrank_b belongs to no quantized layer",
        ),
    ],
    ids=["missing", "no-scale", "dtype", "shape", "surplus", "surplus-at-dense"],
)
def test_tampered_checkpoints_are_refused(
    tamper: Callable[[dict[str, Tensor]], Any], problem: str, tmp_path: Path
) -> None:
    out = assembled(tmp_path)
    tensors = load_file(out / "model.safetensors")
    tamper(tensors)
    shards.write_tensors(out / "model.safetensors", {name: t.contiguous() for name, t in tensors.items()})
    with pytest.raises(VerificationError, match=problem):
        open_source(str(out))
    with pytest.raises(VerificationError, match=problem):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_layer_cannot_have_both_codes_and_a_dense_weight(tmp_path: Path) -> None:
    out = assembled(tmp_path)
    tensors = load_file(out / "model.safetensors")
    shards.write_tensors(out / "model.safetensors", tensors | {f"{Q}.weight": torch.zeros(64, 64)})
    with pytest.raises(VerificationError, match=f"{Q} has a dense weight"):
        open_source(str(out))
    with pytest.raises(VerificationError, match=f"{Q}.weight belongs to no quantized layer"):
        AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"activations": {"bits": 3}}, "activations.bits"),
        ({"activations": {"bits": 8, "static": True}}, "activations.static"),
        ({"activations": None}, "activations: "),
        ({"inputs": 8}, "unknown: inputs"),
    ],
    ids=str,
)
def test_configs_that_are_not_understood_are_refused(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    out = assembled(tmp_path)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= change
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match=problem):
        open_source(str(out))
    with pytest.raises(VerificationError, match=problem):
        AutoModelForCausalLM.from_pretrained(out)
