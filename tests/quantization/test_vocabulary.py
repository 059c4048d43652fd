"""Quantized heads and embeddings: what is stored, what computes it, and what reads and writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qcli.quantization.vocabulary as vocabulary_module
from qcli.core.formats.affine import Affine
from qcli.distillation.distill import distill
from qcli.evaluation.evaluate import evaluate
from qcli.evaluation.options import EvalOptions
from qcli.export.inspect import inspect
from qcli.export.pack import pack
from qcli.export.packable import require_packable
from qcli.export.verify import verify
from qcli.inference.linear import QuantLinear
from qcli.inference.load import load_model, loaded_bytes, tensor_bytes
from qcli.inference.vocabulary import QuantEmbedding, TiedHead
from qcli.models.manifest import Manifest
from qcli.models.native import NativeSource
from qcli.models.open import open_source
from qcli.models.vocabulary import Vocabulary
from qcli.quantization.plan import make_plan
from qcli.quantization.quantize import quantize
from qcli.quantization.sequential import Sequential
from qcli.recipe.load import load_recipe
from qcli.utils.errors import UnsupportedError, UsageError, VerificationError
from qcli.utils.markdown import plain
from tests.quantizing import TOKENS, in_pieces, logits, run, streamed, weights, write_text
from tests.tiny import HIDDEN, VOCAB, tiny_model

HEAD = {"bits": 4, "group_size": 32}
BOTH: dict[str, Any] = {"method__name": "rtn", "lm_head": HEAD, "embeddings": {"bits": 6, "group_size": 16}}


def opened(folder: Path) -> NativeSource:
    source = open_source(str(folder))
    assert isinstance(source, NativeSource)
    return source


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(open_source(str(folder)), torch.device("cpu"), dtype)


def rounded(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """The nearest of symmetric grids, float16 scales, the larger side with the extra code."""
    groups = weight.view(-1, group_size)
    low, high, half = groups.amin(1), groups.amax(1), 1 << (bits - 1)
    scale = torch.where(-low >= high, -low, -high) / half
    scale = torch.where(scale == 0, torch.ones_like(scale), scale).half().float()[:, None]
    return (scale * (groups / scale).round().clamp(-half, half - 1)).view_as(weight)


@pytest.mark.parametrize("tied", [True, False])
def test_stored_packed_and_loaded_back(tied: bool, tmp_path: Path) -> None:
    model, out = tiny_model("llama", tmp_path, tie_word_embeddings=tied), tmp_path / "out"
    result = run(model, out, **(BOTH if not tied else BOTH | {"embeddings": None}))
    source, names = opened(out), ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    assert [*source.vocabulary] == [report.name for report in result.vocabulary] == names
    original = open_source(str(model))
    for name, bits, size in [(names[0], 4, 32)] if tied else [(names[0], 6, 16), (names[1], 4, 32)]:
        weight = original.read([f"{name}.weight"])[f"{name}.weight"]
        decoded = source.read([f"{name}.weight"])[f"{name}.weight"]
        assert source.vocabulary[name].format == Affine(bits=bits, group_size=size, zero_point="none")
        torch.testing.assert_close(decoded, rounded(weight, bits, size), rtol=0, atol=1e-6)
    expected, model_of = streamed(out), loaded(out)
    with torch.no_grad():
        torch.testing.assert_close(model_of(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(model_of.get_input_embeddings(), QuantEmbedding)
    assert type(model_of.get_output_embeddings()) is (TiedHead if tied else QuantLinear)
    assert loaded_bytes(source, torch.float32) == tensor_bytes(model_of) - 2 * 4 * 8  # two rotary tables
    assert ("lm_head.weight_packed" in source.extents) is not tied
    verify(out)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gemma3_text", {}), ("gpt2", {}), ("bloom", {}), ("opt", {}), ("gpt_neox", {}), ("falcon", {})],
)
def test_every_kind_of_embedding(family: str, settings: Mapping[str, Any], tmp_path: Path) -> None:
    """Scaled ones, those of blocks that transpose weights, and heads of other names."""
    out = tmp_path / "out"
    run(tiny_model(family, tmp_path, **settings), out, method__name="rtn", embeddings=HEAD)
    expected = streamed(out)
    torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(loaded(out)(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_plan_counts_every_byte(tmp_path: Path) -> None:
    for tied in (True, False):
        model = tiny_model("llama", tmp_path, tie_word_embeddings=tied)
        given = {"model": str(model), "method.name": "rtn", "method.group_size": 32, "lm_head": HEAD}
        plan, out = make_plan(load_recipe(None, given)), tmp_path / f"out-{tied}"
        result = run(model, out, method__name="rtn", lm_head=HEAD)
        assert plan.bytes == result.plan.bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
        assert plan.model_bits_per_weight == pytest.approx(opened(out).model_bits_per_weight())
        name = "model.embed_tokens" if tied else "lm_head"
        row = plan.to_json()["vocabulary"]
        assert [(each["name"], each["method"], each["bits"], each["bits_per_weight"]) for each in row] == [
            (name, "rtn", 4, 4.5)
        ]
        assert f"{name}.weight" not in plan.to_json()["outside"]
        manifest = Manifest.read(out)
        assert f"{name}.weight" not in manifest.dense and "model.norm.weight" in manifest.dense
        assert manifest.bits_per_weight == plan.bits_per_weight  # of the blocks' layers, as without


@pytest.mark.parametrize("tied", [True, False])
def test_error_feedback_reads_what_the_final_norm_gives(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After quantized blocks; and it leaves less error there than rounding."""
    model, text = tiny_model("llama", tmp_path, tie_word_embeddings=tied), write_text(tmp_path)
    used: list[Tensor] = []
    quantize = vocabulary_module.quantize_vocabulary

    def watched(plan: Any, hessian: Tensor, *others: Any) -> Any:
        used.append(hessian)
        return quantize(plan, hessian, *others)

    monkeypatch.setattr("qcli.quantization.job.quantize_vocabulary", watched)
    feedback = {**HEAD, "method": "gptq-like"}
    result = run(model, tmp_path / "out", text, method__name="rtn", method__bits=3, lm_head=feedback, dtype="float32")
    (report,) = result.vocabulary
    assert (report.method, report.measure) == ("gptq-like", "output")
    # The same blocks with a dense head: what its head reads is what counts.
    run(model, tmp_path / "dense", text, method__name="rtn", method__bits=3)
    whole, seen = loaded(tmp_path / "dense"), []
    whole.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    from qcli.data.tokens import TokenRequest, calibration_tokens

    with torch.no_grad():
        whole(calibration_tokens(TokenRequest(str(text), 6, 32, 0), open_source(str(model))).ids)
    expected = seen[0].T @ seen[0] / len(seen[0])
    torch.testing.assert_close(used[0], expected, rtol=1e-3, atol=1e-4)

    def error(folder: Path) -> float:
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        difference = opened(folder).read([name])[name] - open_source(str(model)).read([name])[name]
        return float((difference @ expected * difference).sum())

    run(model, tmp_path / "rtn", text, method__name="rtn", method__bits=3, lm_head=HEAD)
    assert error(tmp_path / "out") < 0.5 * error(tmp_path / "rtn")


@pytest.mark.parametrize("fitted", [False, True], ids=["rounded", "tied to a fitted head"])
def test_blocks_are_calibrated_with_the_rounded_embedding(
    fitted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they are compared with has the original one; so have they, where its codes follow from what they give."""
    model, text = tiny_model("llama", tmp_path, tie_word_embeddings=True), write_text(tmp_path)
    entered: list[Tensor] = []
    load = Sequential.load

    def watched(quantizer: Sequential, index: int, saved: Any) -> Any:
        assert quantizer.original is not None
        if index == 0:
            entered.extend(stream.training[0].clone() for stream in (quantizer.quantized, quantizer.original))
            assert isinstance(quantizer.samples.training, Tensor)
            entered.append(quantizer.samples.training)
        return load(quantizer, index, saved)

    monkeypatch.setattr(Sequential, "load", watched)
    section: dict[str, Any] = {"lm_head": {**HEAD, "method": "gptq-like"}} if fitted else {"embeddings": HEAD}
    run(model, tmp_path / "out", text, method__name="gptq-like", dtype="float32", **section)
    quantized, original, tokens = entered
    tables = [opened(tmp_path / "out"), open_source(str(model))]
    rounded, dense = (source.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"] for source in tables)
    assert torch.equal(quantized, (dense if fitted else rounded)[tokens])
    assert torch.equal(original, dense[tokens])


@pytest.mark.parametrize("method", ["rtn", "gptq-like"])
def test_slices_of_rows_change_nothing(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny_model("llama", tmp_path, tie_word_embeddings=False), write_text(tmp_path)
    settings: dict[str, Any] = {"method__name": "rtn", "lm_head": {**HEAD, "method": method}}
    whole = run(model, tmp_path / "whole", text, **settings)
    monkeypatch.setattr(vocabulary_module, "VOCABULARY_SLICE", 50 * HIDDEN)
    parts = run(model, tmp_path / "parts", text, **settings)
    names = [f"lm_head.{suffix}" for suffix in ("weight_packed", "weight_scale")]
    one, other = (opened(tmp_path / name).read_packed("lm_head") for name in ("whole", "parts"))
    assert all(torch.equal(one[name.removeprefix("lm_head.")], other[name.removeprefix("lm_head.")]) for name in names)
    assert parts.vocabulary[0].error == pytest.approx(whole.vocabulary[0].error, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rtn", "gptq-like"])
def test_interrupted_anywhere_the_bytes_are_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the head is missing, activations pass through all finished blocks again."""
    model, text = tiny_model("llama", tmp_path), write_text(tmp_path)
    settings: dict[str, Any] = {"method__name": name, "method__bits": 3, "lm_head": {**HEAD, "method": "gptq-like"}}
    run(model, tmp_path / "whole", text, **settings)
    stops = in_pieces(lambda: run(model, tmp_path / "pieces", text, **settings), tmp_path / "pieces", monkeypatch)
    assert stops == 4  # tokens, two blocks, what is outside of them
    assert weights(tmp_path / "pieces") == weights(tmp_path / "whole")
    assert Manifest.read(tmp_path / "pieces").vocabulary == Manifest.read(tmp_path / "whole").vocabulary


@pytest.mark.slow
def test_distillation_and_allocation_keep_them(tmp_path: Path) -> None:
    model, text = tiny_model("llama", tmp_path), write_text(tmp_path)
    calibration = {"calibration.data": str(text), "calibration.samples": 12, "calibration.seq_len": 32}
    bits = {"method.bits": "auto", "method.target_bpw": 4.5, "method.group_size": 32}
    recipe = load_recipe(None, {"model": str(model), **calibration, **bits, "lm_head": {**HEAD, "method": "gptq-like"}})
    result = quantize(recipe, tmp_path / "student")
    assert [report.name for report in result.vocabulary] == ["lm_head"]
    steps = {"distill.steps": 2, "distill.judgements": 1, "distill.train": ["tables", "weights"]}
    distill(tmp_path / "student", load_recipe(None, {"model": str(model), **calibration, **steps}), tmp_path / "out")
    verify(tmp_path / "out")
    before, after = (opened(tmp_path / name).read_packed("lm_head") for name in ("student", "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert Manifest.read(tmp_path / "out").vocabulary == result.vocabulary
    torch.testing.assert_close(logits(tmp_path / "out"), streamed(tmp_path / "out"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_again_by_transformers(tied: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tiny_model("llama", tmp_path, tie_word_embeddings=tied), out, method__name="rtn", lm_head=HEAD)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model.tie_weights()  # as accelerate and peft do
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(out))
    assert {*opened(tmp_path / "again").extents} == {*opened(out).extents}
    base = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).model
    assert isinstance(base.embed_tokens, QuantEmbedding) is tied


def test_only_looked_up_rows_are_decoded_in_the_dtype_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(tiny_model("llama", tmp_path), out, method__name="rtn", embeddings={"bits": 8, "group_size": -1})
    embedding = loaded(out).get_input_embeddings()
    table = opened(out).read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    shapes: list[tuple[int, int]] = []
    restore = Affine.from_stored

    def watched(format: Affine, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Any:
        shapes.append(shape)
        return restore(format, tensors, shape)

    monkeypatch.setattr(Affine, "from_stored", watched)
    tokens = torch.tensor([[5, 300, 5]])
    assert torch.equal(embedding(tokens), table[tokens])
    assert shapes == [(3, HIDDEN)]
    compiled: Any = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens), table[tokens])
    embedding.to(torch.bfloat16)
    assert torch.equal(embedding(tokens), table[tokens].bfloat16())
    assert {name: tensor.dtype for name, tensor in embedding.tensors.items()} == {
        "weight_packed": torch.int32,
        "weight_scale": torch.float16,
    }
    assert (embedding.weight.shape, embedding.weight.dtype) == ((VOCAB, HIDDEN), torch.bfloat16)


def test_evaluation_decodes_them(tmp_path: Path) -> None:
    model, text = tiny_model("llama", tmp_path, tie_word_embeddings=False), write_text(tmp_path)
    run(model, tmp_path / "out", **BOTH)
    run(model, tmp_path / "dense", method__name="rtn")
    options = EvalOptions([str(text)], window=32, max_windows=4, device="cpu")
    both, blocks = (evaluate(str(tmp_path / name), options, baseline=str(model)) for name in ("out", "dense"))
    assert both.kl is not None and blocks.kl is not None and both.kl > blocks.kl > 0
    assert both.model_bits_per_weight < blocks.model_bits_per_weight
    assert both.bits_per_weight == blocks.bits_per_weight


def test_inspect_and_verify_know_them(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tiny_model("llama", tmp_path, tie_word_embeddings=False), out, **BOTH)
    rows = inspect(out).vocabulary
    assert [(row["name"], row["bits"], row["bits_per_weight"], row["shape"]) for row in rows] == [
        ("model.embed_tokens", 6, 7.0, [VOCAB, HIDDEN]),
        ("lm_head", 4, 4.5, [VOCAB, HIDDEN]),
    ]
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["vocabulary"] = config["quantization_config"]["vocabulary"][:1]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match=r"lm_head.weight_(packed|scale) belongs to no quantized layer"):
        open_source(str(out))


@pytest.mark.parametrize("tied", [True, False])
def test_what_layouts_do_with_them(tied: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    eight = {"bits": 8, "group_size": 32}
    run(tiny_model("llama", tmp_path, tie_word_embeddings=tied), out, method__name="rtn", lm_head=eight)
    for format in ("qcli", "dense"):
        result = pack(out, tmp_path / format, format=format, shard_size=10**9)
        assert result.max_logit_difference == 0
        verify(tmp_path / format)
        card = (tmp_path / format / "README.md").read_text()
        name = "model.embed_tokens" if tied else "lm_head"
        assert f"| {plain(name)} | rtn (8 bits, groups of 32) |" in card
    assert inspect(tmp_path / "dense").vocabulary[0]["stored_as"] == "F32"
    for format in ("compressed-tensors", "gptq"):
        with pytest.raises(UnsupportedError, match="packs linear layers of blocks alone") as caught:
            pack(out, tmp_path / format, format=format, shard_size=10**9)
        assert "lm_head" in str(caught.value.hint)


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_stores_them_in_its_own_types(tied: bool, tmp_path: Path) -> None:
    import gguf

    from tests.tiny import with_merge

    out = tmp_path / "out"
    model = with_merge(tiny_model("llama", tmp_path, tie_word_embeddings=tied))
    planned = {"model": str(model), "method.name": "rtn", "method.group_size": 32}
    coarse, fine = (
        make_plan(load_recipe(None, {**planned, "lm_head": {"bits": 8, "group_size": size}})) for size in (32, 16)
    )
    require_packable(coarse, out, "gguf", None)  # known before anything is quantized
    with pytest.raises(UnsupportedError, match=r"(lm_head|tokens) \(8 bits, affine\) fits none of gguf's types"):
        require_packable(fine, out, "gguf", None)
    run(model, out, method__name="rtn", lm_head={"bits": 8, "group_size": 32})
    pack(out, tmp_path / "gguf", format="gguf", shard_size=10**9)
    reader = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == ("Q8_0" if tied else "F32")
    assert types.get("output.weight") == (None if tied else "Q8_0")
    assert inspect(tmp_path / "gguf").vocabulary[0]["stored_as"] == "Q8_0"


@pytest.mark.parametrize(
    ("tied", "fields", "message"),
    [
        (True, BOTH, r"--embeddings: the head shares the weights of model.embed_tokens, which `lm_head` gives another"),
        (False, {"lm_head": {"group_size": 48}}, "--lm-head: group_size: groups of 48 do not divide its 64 inputs"),
        (False, {"embeddings": {"group_size": 0}}, "--embeddings: group_size: must be positive, or -1 for whole rows"),
        (False, {"lm_head": {"bits": 5}}, "--lm-head: bits: must be 8, 6 or 4, not 5"),
        (False, {"embeddings": {"method": "rtn"}}, "--embeddings: method: unknown key; known: bits, group_size"),
    ],
)
def test_what_does_not_fit_is_named(tied: bool, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {key.replace("__", "."): value for key, value in fields.items()}
    model = str(tiny_model("llama", tmp_path, tie_word_embeddings=tied))
    with pytest.raises(UsageError, match=message):
        make_plan(load_recipe(None, {"model": model, "method.name": "rtn", "method.group_size": 32, **given}))


def test_names_are_those_of_the_model(tmp_path: Path) -> None:
    from qcli.models.loadable import require_loadable

    for family, expected in {
        "llama": ("model.embed_tokens", "lm_head", False),
        "gpt_neox": ("gpt_neox.embed_in", "lm_head", False),
        "gpt2": ("transformer.wte", "lm_head", True),
    }.items():
        source = open_source(str(tiny_model(family, tmp_path)))
        assert Vocabulary.of(require_loadable(source), source.tensors()) == Vocabulary(*expected)
