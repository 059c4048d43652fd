"""Adapters of peft on packed models, compared with the same adapters on the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from qcli.core.formats.affine import Affine
from qcli.export.pack import pack
from qcli.inference.backends import reference
from qcli.inference.linear import QuantLinear
from qcli.utils.errors import UnsupportedError
from tests.quantizing import TOKENS, run
from tests.tiny import tiny_model

CAUSAL: Any = AutoModelForCausalLM
ADAPTERS: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False}


def checkpoint(tmp_path: Path, model_type: str = "llama", **flags: Any) -> Path:
    run(tiny_model(model_type, tmp_path), tmp_path / "out", method__name="rtn", **flags)
    return tmp_path / "out"


def with_adapters(model: Any, seed: int = 0, **options: Any) -> Any:
    """The same random adapters at every call: on all linear layers."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(**ADAPTERS | options), autocast_adapter_dtype=False)
    # The order of the layers is that of a set of names: values follow the name instead.
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
            parameter.data = (0.1 * values).to(parameter.dtype)
    return adapted


def adapters(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def stored(model: Any) -> dict[str, torch.Tensor]:
    """The packed tensors."""
    return {
        f"{name}.{suffix}": tensor.clone()
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        for suffix, tensor in module.tensors.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "options"),
    [("llama", {}), ("llama", {"use_dora": True}), ("gpt2", {}), ("opt", {"bias": "lora_only"})],
    ids=["lora", "dora", "conv1d", "biases"],
)
def test_loss_and_gradients_are_those_of_the_dense_model(
    model_type: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, model_type)
    pack(folder, tmp_path / "dense", format="dense", shard_size=10**9)
    packed, dense = (
        with_adapters(CAUSAL.from_pretrained(path, dtype=torch.float32).eval(), fan_in_fan_out=conv1d, **options)
        for path, conv1d in ((folder, False), (tmp_path / "dense", model_type == "gpt2"))
    )
    losses = [model(TOKENS, labels=TOKENS).loss for model in (packed, dense)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    found, expected = adapters(packed), adapters(dense)
    assert any("bias" in name for name in found) == ("bias" in options)
    assert found.keys() == expected.keys() and len(found) >= 2 * 4 * 2
    for name, parameter in found.items():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-5 or "k_proj.base_layer.bias" in name, "only these have no effect"
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.slow
def test_training_in_bfloat16_moves_adapters_only(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    model = CAUSAL.from_pretrained(folder, dtype=torch.bfloat16)
    model.gradient_checkpointing_enable()
    adapted = with_adapters(model, init_lora_weights=True)
    assert {parameter.dtype for parameter in adapters(adapted).values()} == {torch.bfloat16}
    before = stored(adapted)
    optimizer = torch.optim.AdamW(adapters(adapted).values(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = adapted.train()(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5, losses
    after = stored(adapted)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        logits = adapted.eval()(TOKENS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {"adapter_model.safetensors"}
    fresh = CAUSAL.from_pretrained(folder, dtype=torch.bfloat16)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter", autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, logits)


@pytest.mark.slow
def test_trainer_takes_adapters_and_refuses_the_packed_model_alone(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    auto: Any = AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float32, num_labels=2)
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    rows: Any = [{"input_ids": row, "labels": torch.tensor(label)} for label, row in enumerate(TOKENS)]
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model, arguments, train_dataset=rows)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    before = {name: parameter.detach().clone() for name, parameter in adapters(adapted).items()}
    Trainer(adapted, arguments, train_dataset=rows).train()
    changed = {name for name, parameter in adapters(adapted).items() if not torch.equal(parameter, before[name])}
    assert any("lora_B" in name for name in changed) and any("score" in name for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merging_and_initializations_that_change_the_weight_are_refused(
    options: dict[str, Any], safe: bool, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path)
    adapted = with_adapters(CAUSAL.from_pretrained(folder, dtype=torch.float32), **options)
    with pytest.raises(UnsupportedError, match="no adapter can be merged"):
        adapted.merge_and_unload(safe_merge=safe)
    with pytest.raises(UnsupportedError, match="packed weight cannot be changed"):
        with_adapters(CAUSAL.from_pretrained(folder, dtype=torch.float32), init_lora_weights="pissa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [1 << 20, 3 * 40])
def test_the_backward_pass_decodes_again(tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    format = Affine(bits=3, group_size=16, zero_point="integer")
    layer = QuantLinear(format, 40, 24, torch.randn(24))
    for tensor in layer.tensors.values():
        values = torch.rand(tensor.shape) if tensor.is_floating_point() else torch.randint(0, 200, tensor.shape)
        tensor.copy_(values)
    monkeypatch.setattr(reference, "_TILE", tile)
    assert layer.bias is not None
    layer.bias.requires_grad_()
    x = torch.randn(2, 5, 40).to(dtype).requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in layer.tensors.values()}
    gradient = torch.randn(output.shape).to(dtype)
    found = torch.autograd.grad(output, (x, layer.bias), gradient)
    dense = torch.nn.functional.linear(x, layer.weight.to(dtype), layer.bias.to(dtype))
    torch.testing.assert_close(output, dense, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (2e-2, 2e-1)
    torch.testing.assert_close(found, torch.autograd.grad(dense, (x, layer.bias), gradient), rtol=rtol, atol=atol)
