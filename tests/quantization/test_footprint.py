"""The memory that a quantization is planned to take: it grows with what it depends on, and bounds the run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qcli.quantization.footprint import quantization_demand
from qcli.quantization.plan import make_plan
from qcli.recipe.load import load_recipe
from qcli.utils.errors import ResourceError, UsageError
from qcli.utils.placement import Demand
from tests.quantizing import run, write_text
from tests.tiny import tiny_model

METHODS = ("rtn", "gptq-like", "teq", "lcq", "onebit", "dbllm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path)
    return tmp_path


def demand(folder: Path, model: Path | None = None, *, fast: bool = False, **fields: Any) -> Demand:
    given: dict[str, Any] = {"model": str(model or folder / "model"), "calibration.data": str(folder / "text.txt")}
    given |= {"calibration.samples": 8, "calibration.seq_len": 64}
    given |= {} if fields.get("method__name") == "onebit" else {"method.group_size": 32}
    recipe = load_recipe(None, given | {name.replace("__", "."): value for name, value in fields.items()})
    return quantization_demand(make_plan(recipe), torch.float32, fast=fast)


@pytest.mark.parametrize("method", METHODS)
def test_larger_models_need_more(method: str, folder: Path) -> None:
    sizes: list[dict[str, Any]] = [{}, {"intermediate_size": 512}, {"num_hidden_layers": 4}]
    for number in range(len(sizes)):
        (folder / f"{number}").mkdir()
    small, wide, deep = (tiny_model("llama", folder / f"{number}", **size) for number, size in enumerate(sizes))
    needed = [demand(folder, model, method__name=method) for model in (small, wide, deep)]
    assert needed[0].device < needed[1].device
    assert needed[0].waiting <= needed[1].waiting
    assert needed[0].device == needed[2].device  # one block at a time
    assert needed[0].waiting == needed[2].waiting


def test_activations_grow_with_the_text_and_the_work_with_what_is_done(folder: Path) -> None:
    model = tiny_model("llama", folder)
    plain = demand(folder, model)
    assert demand(folder, model, calibration__samples=16).waiting == 2 * plain.waiting
    assert demand(folder, model, calibration__seq_len=128).waiting == 2 * plain.waiting
    assert demand(folder, model, method__refit_target=False).waiting < plain.waiting  # one stream
    assert demand(folder, model, fast=True).waiting < plain.waiting
    assert demand(folder, model, refine__steps=5).device > plain.device
    assert demand(folder, model, method__name="rtn").waiting == 0
    block, whole = (demand(folder, model, method__name="teq", method__loss=loss) for loss in ("block", "kl"))
    assert whole.device > block.device


def test_what_does_not_fit_is_refused_before_any_work(folder: Path) -> None:
    model, out = tiny_model("llama", folder), folder / "out"
    with pytest.raises(ResourceError, match=r"needs about \d.\d GB of memory, --max-memory allows 1MB") as refused:
        run(model, out, folder / "text.txt", max_memory="1MB")
    assert refused.value.hint is not None and "--samples" in refused.value.hint
    assert not [*folder.glob("out*")]
    with pytest.raises(ResourceError) as refused:
        run(model, out, folder / "text.txt", max_memory="1MB", refine__steps=5)
    assert refused.value.hint is not None and "refine.train=[tables]" in refused.value.hint
    with pytest.raises(UsageError, match=re.escape("must be written as '8GB' or '7.5GiB', not '12'")):
        run(model, out, folder / "text.txt", max_memory="12")


def test_the_bound_is_no_part_of_the_result(folder: Path) -> None:
    model = tiny_model("llama", folder)
    run(model, folder / "out", max_memory="32GB", method__name="rtn")
    assert "max_memory" not in (folder / "out" / "recipe.yaml").read_text()
