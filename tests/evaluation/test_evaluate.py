"""Evaluation against the whole model, computed directly; and what makes two models comparable."""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qcli.data.identity import text_identity
from qcli.data.source import TextSource
from qcli.data.tokens import Tokens
from qcli.evaluation import scoring, windows
from qcli.evaluation.contamination import seen_texts
from qcli.evaluation.evaluate import compare, evaluate
from qcli.evaluation.final_states import final_states
from qcli.evaluation.options import EvalOptions
from qcli.evaluation.results import Evaluation, Score
from qcli.models import stream
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.calibrate import calibrate
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe
from qcli.utils.cache import Cache
from qcli.utils.errors import ResourceError, UsageError, VerificationError
from qcli.utils.progress import silent
from tests.manifests import manifest_of
from tests.tiny import HIDDEN, VOCAB, tiny_model, tiny_tokenizer, with_bos

LLAMA = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
TEXT = " ".join(f"{n} times {n + 1} is {n * (n + 1)};" for n in range(80))


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches, the last one smaller, and several slices of each window."""
    monkeypatch.setattr(stream, "BATCH_TOKENS", 130)
    monkeypatch.setattr(scoring, "_LOGITS", 23 * VOCAB)


def perturbed(folder: Path, tmp_path: Path) -> Path:
    """The same model with other weights in its blocks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    model.save_pretrained(tmp_path / "perturbed")
    tiny_tokenizer().save_pretrained(tmp_path / "perturbed")
    return tmp_path / "perturbed"


@torch.no_grad()
def logits(folder: Path, windows: Tensor) -> Tensor:
    """Of the whole model, for every position that predicts a token of the window: float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # in evaluation mode
    logits: Tensor = model(input_ids=windows, use_cache=False).logits
    return logits[:, :-1].double()


def expected(folder: Path, baseline: Path, window: int) -> dict[str, float]:
    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    windows = ids[: len(ids) // window * window].view(-1, window)
    own, reference = (logits(each, windows).log_softmax(-1) for each in (folder, baseline))
    targets = windows[:, 1:, None]
    kl = (reference.exp() * (reference - own)).sum(-1).mean(-1)
    return {
        "value": own.gather(-1, targets).mean().neg().exp().item(),
        "baseline": reference.gather(-1, targets).mean().neg().exp().item(),
        "kl": kl.mean().item(),
        "worst": kl.argmax().item(),
        "worst_kl": kl.max().item(),
        "top1": (own.argmax(-1) == reference.argmax(-1)).double().mean().item(),
        "windows": len(windows),
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "opt", "falcon"])
def test_equals_the_whole_model(family: str, tmp_path: Path, text: str) -> None:
    baseline = tiny_model(family, tmp_path)
    model = perturbed(baseline, tmp_path)
    result = evaluate(str(model), EvalOptions([text], window=50, device="cpu"), baseline=str(baseline)).to_json()
    direct = expected(model, baseline, 50)
    score = result["perplexity"][text]
    assert score["value"] == pytest.approx(direct["value"], rel=1e-5)
    assert result["baseline"]["perplexity"][text] == pytest.approx(direct["baseline"], rel=1e-5)
    assert result["kl"] == pytest.approx(direct["kl"], rel=1e-5)
    assert result["kl"] > 1e-3
    assert score["worst_window"] == direct["worst"]
    assert result["worst_window_kl"] == score["worst_window_kl"] == pytest.approx(direct["worst_kl"], rel=1e-5)
    assert result["top1_agreement"] == pytest.approx(direct["top1"], abs=1e-9)
    assert (score["window"], score["stride"], score["bos"]) == (50, 50, False)
    assert (score["windows"], score["tokens"]) == (direct["windows"], direct["windows"] * 49)


@torch.no_grad()
def test_begin_tokens_are_read_and_never_predicted(tmp_path: Path, text: str) -> None:
    """With one in front all of the text is predicted; of two, the second is not."""
    model = with_bos(tiny_model("llama", tmp_path))
    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])[: 3 * 31].view(3, 31)
    windows = torch.cat([torch.zeros(3, 1, dtype=torch.int64), ids], 1)
    log = logits(model, windows).log_softmax(-1)
    options = EvalOptions([text], window=32, max_windows=3, device="cpu")
    score = evaluate(str(model), options).to_json()["perplexity"][text]
    assert score["value"] == pytest.approx(log.gather(-1, ids[..., None]).mean().neg().exp().item(), rel=1e-5)
    assert (score["bos"], score["window"], score["stride"], score["tokens"]) == (True, 32, 31, 93)
    without = evaluate(str(model), replace(options, bos=False)).to_json()["perplexity"][text]
    assert (without["bos"], without["stride"], without["tokens"]) == (False, 32, 93)
    text_alone = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])[: 3 * 32].view(3, 32)
    plain = logits(model, text_alone).log_softmax(-1).gather(-1, text_alone[:, 1:, None])
    assert without["value"] == pytest.approx(plain.mean().neg().exp().item(), rel=1e-5)
    tokens, stream = (
        Tokens(windows, text, 2),
        ModelStream(open_source(str(model)), device=torch.device("cpu"), dtype=torch.float32),
    )
    both = scoring.score(tokens, final_states("model", stream, [tokens], Cache(None), silent), None, silent)
    assert both.perplexity == pytest.approx(log[:, 1:].gather(-1, ids[:, 1:, None]).mean().neg().exp().item(), rel=1e-5)
    assert both.tokens == 3 * 30


def test_a_model_against_itself_loses_nothing(tmp_path: Path, text: str) -> None:
    model = str(tiny_model("llama", tmp_path))
    result = evaluate(model, EvalOptions([text], window=64, device="cpu"), baseline=model)
    assert result.kl == 0.0
    assert result.top1_agreement == 1.0
    (score,) = result.scores.values()
    assert score.perplexity == score.baseline_perplexity


def test_without_a_baseline_only_perplexity(tmp_path: Path, text: str) -> None:
    model = tiny_model("llama", tmp_path)
    result = evaluate(str(model), EvalOptions([text], max_windows=2, device="cpu")).to_json()
    assert result["kl"] is result["worst_window_kl"] is result["top1_agreement"] is result["baseline"] is None
    assert result["perplexity"][text]["window"] == 256  # the model's context
    assert result["perplexity"][text]["windows"] == 2
    assert result["bits_per_weight"] == result["linear_bits_per_weight"] == result["model_bits_per_weight"] == 32
    assert result["bytes"] == (model / "model.safetensors").stat().st_size
    assert (result["device"], result["dtype"]) == ("cpu", "float32")
    assert set(result["versions"]) == {"qcli", "torch", "transformers"}
    json.dumps(result, allow_nan=False)


def test_several_texts_are_averaged_by_token(tmp_path: Path, text: str) -> None:
    baseline = tiny_model("llama", tmp_path)
    model = str(perturbed(baseline, tmp_path))
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1][:400])
    both, *alone = (
        evaluate(model, EvalOptions(texts, window=40, device="cpu"), baseline=str(baseline))
        for texts in ([text, str(other), text], [text], [str(other)])
    )
    assert list(both.scores) == [text, str(other)]
    assert [both.scores[data] for data in both.scores] == [next(iter(one.scores.values())) for one in alone]
    tokens = [score.tokens for score in both.scores.values()]
    assert both.worst_window_kl == max(one.worst_window_kl for one in alone if one.worst_window_kl is not None)
    assert both.kl == pytest.approx(
        sum(one.kl * n for one, n in zip(alone, tokens, strict=True) if one.kl is not None) / sum(tokens)
    )


def test_self_is_sampled_from_the_baseline(tmp_path: Path) -> None:
    baseline = tiny_model("llama", tmp_path)
    model = perturbed(baseline, tmp_path)
    options = EvalOptions(["self"], window=16, max_windows=3, device="cpu")
    against = evaluate(str(model), options, baseline=str(baseline))
    alone = evaluate(str(baseline), options)
    assert against.scores["self"].sha256 == alone.scores["self"].sha256
    assert against.scores["self"].baseline_perplexity == alone.scores["self"].perplexity


def test_a_model_is_not_evaluated_on_its_calibration_folder(tmp_path: Path, text: str) -> None:
    model = str(tiny_model("llama", tmp_path))
    folders = [tmp_path / name for name in ("seen", "unseen")]
    for seed, folder in enumerate(folders):
        flags = {"model": model, "calibration.data": text, "calibration.samples": 4, "calibration.seq_len": 32}
        calibrate(load_recipe(None, flags | {"seed": seed}), folder)
    flags = {"model": model, "calibration.data": str(folders[0]), "method.group_size": 32}
    quantize(load_recipe(None, flags), tmp_path / "out")
    result = evaluate(str(tmp_path / "out"), EvalOptions([str(folders[1])], device="cpu"), baseline=model)
    (score,) = result.scores.values()
    assert (score.windows, score.window) == (4, 32)
    with pytest.raises(UsageError, match="was calibrated on .*seen"):
        evaluate(str(tmp_path / "out"), EvalOptions([str(folders[0])], max_windows=2, device="cpu"))
    assert evaluate(model, EvalOptions([str(folders[0])], device="cpu")).scores, "an unquantized model has seen nothing"


@pytest.mark.parametrize("through_folder", [False, True])
def test_text_a_model_was_calibrated_on_is_flagged(tmp_path: Path, text: str, through_folder: bool) -> None:
    model, data, other = str(tiny_model("llama", tmp_path)), text, tmp_path / "other.txt"
    other.write_text(Path(text).read_text() + ".")
    flags = {"model": model, "calibration.samples": 4, "calibration.seq_len": 32}
    if through_folder:
        data = str(tmp_path / "calibration")
        calibrate(load_recipe(None, flags | {"calibration.data": text}), Path(data))
    flags |= {"calibration.data": data, "method.group_size": 32}
    fits = {"read": {"method.name": "gptq-like"}, "not read": {"method.name": "rtn"}}
    for name, method in fits.items():
        quantize(load_recipe(None, flags | method), tmp_path / name)
    options = EvalOptions([str(other), text], window=32, max_windows=2, device="cpu")
    fitted_to = {name: evaluate(str(tmp_path / name), options).to_json()["fitted_to"] for name in fits}
    assert fitted_to == {"read": [text], "not read": []}


def test_another_slice_of_the_split_a_model_was_calibrated_on_is_flagged(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    calibrated = manifest_of().model_copy(update={"calibration_text_identity": "builtin + org/name, split train[:9]"})
    calibrated.write(model)
    texts = [TextSource(path="org/name", split=split) for split in ("train", "train[9:]", "test", None)]
    identities = {str(text): text_identity(text, calibration=False) for text in texts}
    seen = seen_texts(open_source(str(model)), identities)
    assert seen == ["org/name, split train", "org/name, split train[9:]"]


def test_a_device_that_does_not_hold_a_block_is_refused(tmp_path: Path, text: str) -> None:
    model = str(tiny_model("llama", tmp_path))
    options = EvalOptions([text], window=32, max_windows=2, device="cpu", max_memory="1MB")
    with pytest.raises(ResourceError, match="evaluating these models needs .* --max-memory allows 1MB") as caught:
        evaluate(model, options)
    assert "--window" in str(caught.value.hint)


def test_more_text_than_memory_is_refused(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "free_memory", lambda _: 2 * 2 * 32 * HIDDEN * 4)
    model = str(tiny_model("llama", tmp_path))
    options = EvalOptions([text], window=32, max_windows=2, device="cpu")
    with pytest.raises(ResourceError, match="hidden states of 96 tokens need") as caught:
        evaluate(model, replace(options, max_windows=3), baseline=model)
    assert "--max-windows" in str(caught.value.hint)
    evaluate(model, options, baseline=model)


def test_one_block_at_a_time_is_real(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    most = 0
    load_block = ModelStream.load_block

    def counted(self: ModelStream, index: int) -> nn.Module:
        nonlocal most
        block = load_block(self, index)
        alive.add(block)
        most = max(most, len(alive))
        return block

    monkeypatch.setattr(ModelStream, "load_block", counted)
    model = str(tiny_model("llama", tmp_path, num_hidden_layers=5))
    evaluate(model, EvalOptions([text], window=32, device="cpu"), baseline=model)
    assert most == 1
    assert not alive


@torch.no_grad()
def test_errors_by_layer_are_those_of_the_modules(tmp_path: Path, text: str) -> None:
    baseline = tiny_model("llama", tmp_path)
    other = perturbed(baseline, tmp_path)
    (result,) = compare([str(other)], EvalOptions([text], window=32, layers=True, device="cpu"), baseline=str(baseline))
    assert result.blocks is not None
    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    models = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (other, baseline)]
    path = "mlp.down_proj"
    seen: list[Tensor] = []
    linears = [model.model.layers[1].get_submodule(path) for model in models]
    linears[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    states = [model(windows, output_hidden_states=True).hidden_states for model in models]
    own, exact = (linear(seen[0]) for linear in linears)
    assert result.blocks[1].layers[path] == pytest.approx(
        float((own - exact).norm() ** 2 / exact.norm() ** 2), rel=1e-4
    )
    difference = (states[0][1] - states[1][1]).norm() ** 2 / states[1][1].norm() ** 2
    assert result.blocks[0].accumulated == pytest.approx(float(difference), rel=1e-4)
    assert set(result.blocks[0].layers) == {name for group in LLAMA for name in group}
    (same,) = compare(
        [str(baseline)], EvalOptions([text], window=32, layers=True, device="cpu"), baseline=str(baseline)
    )
    assert same.blocks is not None
    assert all(error == 0 for block in same.blocks for error in (block.own, block.accumulated, *block.layers.values()))
    with pytest.raises(UsageError, match="measured against a baseline"):
        compare([str(other)], EvalOptions([text], layers=True, device="cpu"))


def test_global_generators_and_precision_are_left_alone(tmp_path: Path, text: str) -> None:
    before = torch.random.get_rng_state(), torch.get_float32_matmul_precision()
    first = evaluate(str(tiny_model("llama", tmp_path)), EvalOptions([text, "self"], window=32, device="cpu"))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert torch.get_float32_matmul_precision() == before[1]
    second = evaluate(first.model, EvalOptions([text, "self"], window=32, device="cpu"))
    assert first == second


def test_a_different_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    model, baseline = tiny_model("llama", tmp_path), tiny_model("llama", tmp_path)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="different tokenizers"):
        evaluate(str(model), EvalOptions([text], window=32, device="cpu"), baseline=str(baseline))


def test_layers_that_stay_dense_count(tmp_path: Path, text: str) -> None:
    model = tiny_model("llama", tmp_path)
    dense = [{"match": "*.mlp.*", "dense": True}]
    flags = {"model": str(model), "method.name": "rtn", "method.bits": 2, "method.group_size": 32, "overrides": dense}
    quantize(load_recipe(None, flags), tmp_path / "out")
    result = evaluate(str(tmp_path / "out"), EvalOptions([text], window=32, max_windows=1, device="cpu"))
    shapes = {layer.name: math.prod(layer.shape) for layer in open_source(str(model)).linears()}
    left = sum(size for name, size in shapes.items() if ".mlp." in name)
    quantized = sum(shapes.values()) - left
    assert result.bits_per_weight < 3
    expected = (result.bits_per_weight * quantized + 32 * left) / sum(shapes.values())
    assert result.linear_bits_per_weight == pytest.approx(expected)


def test_a_different_vocabulary_is_refused(tmp_path: Path, text: str) -> None:
    model, baseline = tiny_model("llama", tmp_path), tiny_model("llama", tmp_path, vocab_size=VOCAB + 8)
    with pytest.raises(UsageError, match="vocabulary of 320, the baseline one of 328"):
        evaluate(str(model), EvalOptions([text], window=32, device="cpu"), baseline=str(baseline))


def test_errors_by_layer_need_the_same_layers(tmp_path: Path, text: str) -> None:
    model, baseline = tiny_model("llama", tmp_path), tiny_model("llama", tmp_path, num_hidden_layers=3)
    with pytest.raises(UsageError, match="have different layers"):
        evaluate(str(model), EvalOptions([text], window=32, layers=True, device="cpu"), baseline=str(baseline))


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path, text: str) -> None:
    folder = tiny_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    model.save_pretrained(folder)
    with pytest.raises(VerificationError, match="logits contain NaN or infinity"):
        evaluate(str(folder), EvalOptions([text], window=32, device="cpu"))


def test_perplexity_beyond_floats_is_null_in_json() -> None:
    score = Score(math.inf, math.inf, 0, math.inf, 0.5, math.inf, 1, 8, "")
    result = Evaluation("m", "b", {"a": score}, {}, {}, None, [], 2.5, 2.5, 3.0, 10, "cpu", "float32").to_json()
    assert result["perplexity"]["a"]["value"] is result["baseline"]["perplexity"]["a"] is None
    assert result["kl"] is result["worst_window_kl"] is result["perplexity"]["a"]["worst_window_kl"] is None
    json.dumps(result, allow_nan=False)


def test_no_data_and_no_such_model(tmp_path: Path, text: str) -> None:
    model = str(tiny_model("llama", tmp_path))
    with pytest.raises(UsageError, match="no text to evaluate on"):
        evaluate(model, EvalOptions([], device="cpu"))
    with pytest.raises(UsageError, match="does not exist"):
        evaluate("./nothing/here", EvalOptions([text], device="cpu"))
