"""Deterministic algorithms: asked for on GPUs alone, put back afterwards; and nothing in use is without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcli.inference.cuda
from qcli.data.draws import draw
from qcli.models.open import open_source
from qcli.quantization.job import run_identity
from qcli.recipe.load import load_recipe
from qcli.utils.determinism import WORKSPACE, any_order, determinism, deterministic, order_where_known
from qcli.utils.errors import UnsupportedError, UsageError
from qcli.utils.run_folder import differences
from tests.determinism import as_on_a_gpu
from tests.tiny import tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def settings() -> list[Any]:
    cudnn = torch.backends.cudnn
    return [
        torch.get_deterministic_debug_mode(),
        os.environ.get(WORKSPACE),
        os.environ.get("TORCHINDUCTOR_DETERMINISTIC"),
        cudnn.deterministic,
        cudnn.benchmark,
        getattr(torch.utils.deterministic, "fill_uninitialized_memory"),  # noqa: B009
    ]


def test_settings_are_those_of_a_gpu_run_and_restored() -> None:
    before = settings()
    with deterministic(GPU):
        assert settings() == [2, ":4096:8", "1", True, False, False]
        with deterministic(GPU), any_order():
            assert torch.get_deterministic_debug_mode() == 0
        with deterministic(GPU), order_where_known():
            assert torch.get_deterministic_debug_mode() == 1
        assert settings() == [2, ":4096:8", "1", True, False, False]
    assert settings() == before
    with pytest.raises(ZeroDivisionError), deterministic(GPU):
        1 / 0  # noqa: B018
    assert settings() == before


@pytest.mark.parametrize(("device", "wanted"), [(CPU, True), (GPU, False)])
def test_nothing_changes_elsewhere(device: torch.device, wanted: bool) -> None:
    before = settings()
    with deterministic(device, wanted=wanted):
        assert settings() == before


def test_the_identity_names_it_where_it_decides_bytes() -> None:
    assert determinism(CPU, True) == determinism(CPU, False) == {}
    assert determinism(GPU, True) != determinism(GPU, False)


def test_a_run_on_a_gpu_is_resumed_as_it_began(tmp_path: Path) -> None:
    source, flags = open_source(str(tiny_model("llama", tmp_path))), {"model": "m", "dtype": "float32"}
    recipes = [load_recipe(None, flags | {"deterministic": wanted}) for wanted in (True, False)]
    on_gpu, on_cpu = (
        [run_identity(recipe, source, device, reads_text=False) for recipe in recipes] for device in (GPU, CPU)
    )
    assert differences(*on_gpu) == "compute.deterministic was True, is False"
    assert differences(*on_cpu) == ""


def test_a_workspace_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic(GPU):
        assert os.environ[WORKSPACE] == ":16:8"
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(UsageError, match=":0:0") as problem, deterministic(GPU):
        pass
    assert problem.value.hint is not None
    assert "--no-deterministic" in problem.value.hint


def put() -> None:
    """Refused on a CPU as well."""
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def cublas() -> None:
    raise RuntimeError("... but this operation is not deterministic because it uses CuBLAS and you have CUDA >= 10.2.")


@pytest.mark.parametrize(("work", "name"), [(put, "put_"), (cublas, "CuBLAS")])
def test_an_operation_without_a_deterministic_algorithm_is_one_line(work: Callable[[], None], name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^{name} has no deterministic") as problem, deterministic(GPU):
        work()
    assert problem.value.hint is not None
    assert "--no-deterministic" in problem.value.hint
    with pytest.raises(RuntimeError, match="shape"), deterministic(GPU):
        torch.ones(2).view(3)


@pytest.mark.slow
def test_torch_compiler_is_not_imported_for_it_but_knows() -> None:
    """Its import takes as long as torch's own."""
    program = """
import sys, torch
from qcli.utils.determinism import deterministic
with deterministic(torch.device("cuda")):
    assert "torch._inductor" not in sys.modules
    import torch._inductor.config as config
    assert config.deterministic
assert not config.deterministic
with deterministic(torch.device("cuda")):
    assert config.deterministic
assert not config.deterministic
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    "operation",
    [
        lambda: torch.ones(3).cumsum(0),
        lambda: torch.ones(3, 2).median(1),
        lambda: torch.ones(3).histc(2),
        lambda: torch.ones(3).kthvalue(1),
        lambda: torch.ones(3, dtype=torch.int64).bincount(torch.ones(3)),
        lambda: torch.nn.functional.nll_loss(torch.ones(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.int64)),
    ],
)
def test_the_watch_finds_what_a_gpu_refuses(operation: Callable[[], object]) -> None:
    with pytest.raises(AssertionError, match="a GPU refuses"), as_on_a_gpu():
        operation()


def test_the_watch_lets_pass_what_a_gpu_has_an_algorithm_for() -> None:
    with as_on_a_gpu():
        torch.ones(3).median()
        torch.ones(3, dtype=torch.int64).cumsum(0)
        torch.zeros(2).scatter_add(0, torch.tensor([0, 0]), torch.ones(2))
        for allowed in (any_order, order_where_known):
            with allowed():
                torch.ones(3).cumsum(0)


def test_kernels_add_nothing_atomically() -> None:
    folder = Path(qcli.inference.cuda.__file__).parent
    sources = [file.read_text() for file in folder.glob("*.py")]
    assert any("tl.load" in source for source in sources)
    assert not [found for source in sources for found in re.findall(r"tl\.atomic\w+", source)]


def test_drawn_tokens_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).expand(4000, -1)
    drawn = draw(probabilities, torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1])
    assert drawn.bincount(minlength=6).tolist() == [0, 1000, 0, 2000, 1000, 0]
    assert drawn.equal(drawn.sort().values)
    top = torch.full((1,), 1 - 2**-53, dtype=torch.float64)
    assert draw(probabilities[:1], top).item() == 4
