"""The compiled CPU kernels against float64 of the decoded weight, and how they are built."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import BASIS, OFFSET, SCALE, Codebook
from qcli.core.formats.dual_binary import DualBinary
from qcli.core.formats.low_rank import LowRank
from qcli.core.formats.sign import Sign
from qcli.core.weight import Format, QuantizedWeight
from qcli.inference import backend
from qcli.inference.backends import cpu
from qcli.inference.cpu import build
from qcli.inference.linear import packed_linear
from qcli.utils.errors import QcliWarning, UnsupportedError
from tests.inference.weights import FORMATS, random_weight

RAGGED: list[Format] = [  # groups that share no vector lanes evenly, and tables too large for a register
    Affine(bits=3, group_size=7),
    Affine(bits=4, group_size=8),
    Affine(bits=4, group_size=96),
    Affine(bits=1, group_size=16),
    Affine(bits=8, group_size=192),
    DualBinary(group_size=17),
    Codebook(bits=3, group_size=12, rank=2, table_bits=8, basis_rows=5),
    Codebook(bits=5, group_size=64, rank=1, table_bits=8),
    Codebook(bits=7, group_size=64, rank=2, table_bits=16),
]
BASES = [format for format in FORMATS if not isinstance(format, LowRank)]
SHAPES = [(48, 96), (37, 100), (19, 1000), (5, 30), (33, 2048)]
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # of the norm of the outputs
TARGETS = {"AVX2": ["-march=x86-64-v3"], "portable": ["-march=x86-64"]}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests run beside each other, and waiting threads are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    found = cpu.kernels()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@cache
def stored(format: Format, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    """A random weight's tensors and its values, float64."""
    weight = random_weight(format, shape)
    return format.to_stored(weight), weight.dense().double()


def error(kernels: ctypes.CDLL, format: Format, shape: tuple[int, int], dtype: torch.dtype, rows: int) -> float:
    """Of the outputs for random inputs and a bias, relative to their norm."""
    generator = torch.Generator().manual_seed(rows)
    tensors, dense = stored(format, shape)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator)
    y = cpu.linear(kernels, x, format, shape, tensors, bias)
    assert y.shape == (rows, shape[0]) and y.dtype == dtype
    exact = x.double() @ dense.T + bias.double()
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("format", [*BASES, *RAGGED], ids=repr)
def test_outputs_are_those_of_the_decoded_weight(kernels: ctypes.CDLL, format: Format, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for rows in (1, 2, 5, 16, 70):
            assert error(kernels, format, shape, dtype, rows) < TOLERANCES[dtype], (shape, rows)


@pytest.mark.slow
@pytest.mark.skipif(not build.is_x86(), reason="the instruction sets are x86's")
@pytest.mark.parametrize("isa", TARGETS)
def test_other_instruction_sets_compute_the_same(kernels: ctypes.CDLL, isa: str) -> None:
    other = cpu.declared(build.library(TARGETS[isa]))
    assert other.qcli_isa() == isa.encode()
    for format in [*BASES, *RAGGED]:
        for dtype, tolerance in TOLERANCES.items():
            for rows in (1, 5):
                assert error(other, format, (19, 1000), dtype, rows) < tolerance, (format, dtype, rows)


def test_inputs_of_very_different_sizes_keep_their_digits(kernels: ctypes.CDLL) -> None:
    """Inputs in fixed point share a scale with few neighbours: an outlier does not blur the others."""
    format, shape = Affine(bits=4, group_size=128, zero_point="none"), (32, 4096)
    tensors = format.to_stored(random_weight(format, shape))
    tensors["weight_scale"][:, :8] = 0  # columns 0..1023, so that nothing of the outlier is in the outputs
    exact_weight = format.from_stored(tensors, shape).dense().double()
    x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    x[0, 5] = 1e6
    for factor in (1, 1e-30):
        scaled = x * factor
        y = cpu.linear(kernels, scaled, format, shape, tensors, None).double()
        exact = scaled.double() @ exact_weight.T
        assert float((y - exact).norm() / exact.norm()) < 1e-6, factor


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_the_largest_sums_of_a_codebook_fit_their_integers(kernels: ctypes.CDLL, bits: int) -> None:
    """Rows of one code each, among them that of the lowest entry and one whose second integer is the lowest."""
    format, shape = Codebook(bits=bits, group_size=-1, rank=1, table_bits=16), (1 << bits, 4096)
    basis = torch.linspace(-1, 1, 1 << bits)
    basis[1:2] = 1 / 2046 if bits > 1 else 1.0
    ones = torch.ones(1 << bits, 1, 1).half()
    codes = torch.arange(1 << bits, dtype=torch.uint8)[:, None].expand(shape).contiguous()
    tables = {BASIS: basis.half().view(1, 1, -1), SCALE: ones, OFFSET: ones[..., 0] * 0}
    weight = QuantizedWeight(format, shape, codes, tables)
    for x in (torch.ones(1, 4096), -torch.ones(1, 4096)):
        y = cpu.linear(kernels, x, format, shape, format.to_stored(weight), None)
        torch.testing.assert_close(y, (x.double() @ weight.dense().double().T).float(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_outputs_of_its_row_alone(kernels: ctypes.CDLL, bad: float) -> None:
    format = Affine(bits=4, group_size=32)
    x = torch.ones(2, 96)
    x[0, 3] = bad
    y = cpu.linear(kernels, x, format, (48, 96), format.to_stored(random_weight(format, (48, 96))), None)
    assert not y[0].isfinite().any() and y[1].isfinite().all()


def test_any_layout_of_the_inputs_and_any_number_of_threads(kernels: ctypes.CDLL) -> None:
    format, shape = Sign(), (512, 1024)
    tensors = format.to_stored(random_weight(format, shape))
    x = torch.randn(1024, 3, 2, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)

    def outputs(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        return cpu.linear(kernels, x, format, shape, tensors, None)

    one, many = outputs(1), outputs(3)
    assert one.shape == (2, 3, 512) and torch.equal(one, many)
    assert torch.equal(one, cpu.linear(kernels, x.contiguous(), format, shape, tensors, None))
    assert cpu.linear(kernels, x[:0], format, shape, tensors, None).shape == (0, 3, 512)


@pytest.mark.usefixtures("kernels")
def test_layers_on_a_cpu_choose_it() -> None:
    assert all(backend.choose(format, (48, 96), "cpu", torch.bfloat16).backend.name == "cpu" for format in BASES)
    assert "inputs of torch.float64" in backend.choose(Sign(), (48, 96), "cpu", torch.float64).reasons["cpu"]


# ------------------------------------------------------------------------------------------------ building


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new cache folder; nothing is known of kernels or choices."""
    monkeypatch.setenv("QCLI_CACHE", str(tmp_path / "cache"))
    known = (cpu.kernels.cache_clear, backend.choose.cache_clear, backend.SAID.clear)
    for forget in known:
        forget()
    yield tmp_path
    for forget in known:
        forget()


def script(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def copying(kernels: ctypes.CDLL, folder: Path) -> Path:
    """A compiler that takes its time, copies the library and notes the call in `folder/calls`."""
    folder.mkdir(exist_ok=True)
    return script(
        folder / "c++",
        'for flag; do [ "$flag" = -dM ] && echo macros && exit; done',
        f"echo called >> {folder / 'calls'}; sleep 0.3",
        'while [ "$1" != -o ]; do shift; done',
        f'cp {kernels._name} "$2"',
    )


def test_without_a_compiler_the_reference_serves_and_says_so_once(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(unbuilt))
    format = Affine(bits=4, group_size=32)
    weight = random_weight(format, (48, 96))
    x = torch.randn(2, 96)
    with pytest.warns(QcliWarning) as warned:
        for layer in ("model.q_proj", "model.k_proj"):
            y = packed_linear(x, format, (48, 96), format.to_stored(weight), layer=layer)
    torch.testing.assert_close(y, x @ weight.dense().T, rtol=1e-4, atol=1e-4)
    (only,) = (str(warning.message) for warning in warned)
    assert only == (
        "model.q_proj runs on the slow reference backend: cpu: there is no C++ compiler: install one, for example with "
        "`apt install g++`"
    )


def test_a_compiler_that_fails_is_one_line(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = script(unbuilt / "broken", 'case "$*" in *-dM*) exit 0;; esac', "echo 'x.cpp:1: error: no' >&2", "exit 1")
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(QcliWarning, match="building the CPU kernels"):
        reason = cpu.Cpu().unavailable_reason()
    assert reason == f"the C++ compiler {broken} fails: x.cpp:1: error: no: set CXX to another"
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnsupportedError, match="no-such-compiler was not found"):
        build.library()


def test_it_is_built_once_with_one_line(kernels: ctypes.CDLL, unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(copying(kernels, unbuilt / "bin")))
    with pytest.warns(QcliWarning, match="building the CPU kernels") as warned:
        build.library()
        build.library()
    assert len(warned) == 1
    (built,) = (unbuilt / "cache" / "kernels").glob("*.so")
    assert not list(built.parent.glob("*.partial"))


def test_processes_that_start_together_build_it_once(kernels: ctypes.CDLL, unbuilt: Path) -> None:
    environment = os.environ | {"CXX": str(copying(kernels, unbuilt / "bin"))}
    code = "from qcli.inference.cpu.build import library; print(library()._name)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    names = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0] and len(names) == 1
    assert (unbuilt / "bin" / "calls").read_text() == "called\n"


def test_where_the_cache_cannot_be_written_each_process_has_its_own(
    kernels: ctypes.CDLL, unbuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unbuilt / "file").write_text("")
    monkeypatch.setenv("QCLI_CACHE", str(unbuilt / "file" / "cache"))
    monkeypatch.setenv("CXX", str(copying(kernels, unbuilt / "bin")))
    with pytest.warns(QcliWarning, match="at each start"):
        assert build.library().qcli_isa
    (unbuilt / "foreign").mkdir()
    (unbuilt / "foreign" / "thesis.txt").write_text("mine")
    monkeypatch.setenv("QCLI_CACHE", str(unbuilt / "foreign"))
    with pytest.warns(QcliWarning, match="at each start"):
        assert build.library().qcli_isa
    assert os.listdir(unbuilt / "foreign") == ["thesis.txt"]
