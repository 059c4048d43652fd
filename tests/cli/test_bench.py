"""`qcli bench`. No test asserts a time: those are measured by `benchmarks/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qcli.cli.bench import show_layers
from qcli.cli.ui.tables import Tables, console
from qcli.inference import bench
from qcli.inference.bench import Speed
from qcli.utils import environment
from tests.cli.conftest import Invoke
from tests.quantizing import run

QUICK = ("--rounds", 1, "--new-tokens", 2)


@pytest.fixture
def checkpoint(model: Path, tmp_path: Path) -> Path:
    out = tmp_path / "quantized"
    run(model, out, method__name="rtn", method__bits=3)
    return out


@pytest.mark.slow
def test_a_checkpoint_beside_its_original(invoke: Invoke, model: Path, checkpoint: Path, tmp_path: Path) -> None:
    plot = tmp_path / "speed.svg"
    flags = (*QUICK, "--batch", "1,4", "--context", "8,16")
    code, out, err = invoke("bench", checkpoint, "--baseline", model, *flags, "--plot", plot, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert [(point["batch"], point["context"]) for point in result["points"]] == [(1, 8), (1, 16), (4, 8), (4, 16)]
    for point in result["points"]:
        for speeds in (point["model"], point["baseline"], point["ratio"]):
            assert min(speeds.values()) > 0
    packed, dense = result["model"], result["baseline"]
    assert packed["tensors"] < dense["tensors"]
    assert sum(packed["backends"].values()) == 14 and dense["backends"] == {}
    for held in (packed, dense):
        peaks = held["peak"]
        assert 0 < peaks["before"]["rss"] <= peaks["load"]["rss"] <= peaks["run"]["rss"]
    assert len(result["load_average"]) == 2
    assert "<svg" in plot.read_text()
    code, out, err = invoke("bench", checkpoint, *QUICK, "--context", 8)
    assert code == 0, err
    assert "decode tokens/s" in out and "baseline" not in out


def test_ratios_are_those_of_each_round() -> None:
    """A machine that slows down between rounds changes both models alike."""
    rounds = [[Speed(1, 30, 1), Speed(1, 10, 1)], [Speed(1, 3, 1), Speed(1, 1, 1)], [Speed(1, 300, 1), Speed(1, 50, 1)]]
    medians = bench._medians(rounds)
    assert medians["model"]["decode_tokens_per_second"] == 30
    assert medians["baseline"]["decode_tokens_per_second"] == 10
    assert medians["ratio"]["decode_tokens_per_second"] == 3
    assert bench._medians([speeds[:1] for speeds in rounds])["ratio"] is None


def test_layers_once_for_each_shape_and_format(invoke: Invoke, checkpoint: Path) -> None:
    code, out, err = invoke("bench", checkpoint, "--layers", "--batch", "1,3", "--rounds", 1, "--json")
    assert code == 0, err
    result = json.loads(out)
    found = [(tuple(row["shape"]), row["batch"], row["layers"]) for row in result["layers"]]
    kinds = {(64, 64): 4, (32, 64): 4, (128, 64): 4, (64, 128): 2}
    assert found == [(shape, batch, count) for shape, count in kinds.items() for batch in (1, 3)]
    for row in result["layers"]:
        rows, columns = row["shape"]
        groups = columns // 32
        zero_points = 4 * -(-rows * 3 // 32) * groups
        assert row["packed_bytes"] == rows * columns * 3 // 8 + 2 * rows * groups + zero_points
        assert row["gigabytes_per_second"] == pytest.approx(row["packed_bytes"] / row["microseconds"] / 1e3)
        assert row["backend"] and row["ratio"] > 0
    assert result["copy_gigabytes_per_second"] > 0


def test_layers_are_drawn_with_the_reasons_against_other_backends(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    layer: dict[str, Any] = {
        "shape": [64, 32],
        "format": {"format": "low-rank", "rank": 4, "base": {"format": "affine", "bits": 3, "group_size": 32}},
        **{"layers": 2, "batch": 1, "backend": "reference", "why_no_other": {"fast": "no compiler"}},
        **{"microseconds": 1234.5, "bf16_microseconds": 9.5, "gigabytes_per_second": 1.5},
        **{"share_of_copy": 0.25, "ratio": 12.0},
    }
    setting = {"device": "cpu", "device_name": "X", "dtype": "float32", "threads": 1, "rounds": 1}
    result = {"layers": [layer, layer], "copy_gigabytes_per_second": 6.0, "load_average": [0.5, None], **setting}
    show_layers(Tables(console(sys.stdout)), result)
    out = capsys.readouterr().out
    assert "low-rank, affine, bits 3, group_size 32" in out and "1234" in out
    assert out.count("not fast: no compiler") == 1
    assert "load average 0.5 to ?" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch", "0"), "--batch: '0' is not a list of positive numbers"),
        (("--batch", "1,x"), "--batch: '1,x'"),
        (("--context", "1,,2"), "--context: '1,,2'"),
        (("--context", "250"), "282 tokens, the new ones included, exceed its context of 256"),
        (("--new-tokens", "1"), "new-tokens"),
        (("--layers", "--baseline", "x"), "--baseline is of whole models"),
        (("--layers", "--context", "8"), "--context is of whole models"),
        (("--layers",), "has no packed layers"),
        (("--plot", "speed.gif"), "speed.gif is none of .png, .svg, .pdf"),
        (("--plot", "no/such/folder.png"), "no/such is not a folder"),
        (("--baseline", "no-such-folder/x/y"), "does not exist"),
        (("--device", "toaster"), "toaster"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    invoke: Invoke, model: Path, flags: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "load_model", None)
    code, out, err = invoke("bench", model, *flags)
    assert (code, out) == (2, ""), err
    (line,) = [line for line in err.splitlines() if not line.startswith("hint: ")]
    assert line.startswith("error: ") and message in line


def test_a_plot_needs_a_new_file_and_matplotlib(
    invoke: Invoke, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there.png"
    there.write_text("mine")
    assert invoke("bench", model, "--plot", there)[:2] == (3, "")
    assert there.read_text() == "mine"
    monkeypatch.setattr(environment, "can_plot", lambda: False)
    code, out, err = invoke("bench", model, "--plot", tmp_path / "new.png")
    assert (code, out) == (6, "")
    assert err.startswith("error: --plot: matplotlib is not installed\nhint: pip install")


def test_a_process_that_is_killed_is_a_lack_of_memory(
    invoke: Invoke, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures.process import BrokenProcessPool

    class Broken:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, *_: Any) -> Any:
            raise BrokenProcessPool

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Broken)
    code, out, err = invoke("bench", model, *QUICK)
    assert (code, out) == (5, "")
    assert "was killed, perhaps for its memory" in err


def test_both_arms_compute_the_same_tokens(model: Path) -> None:
    """Prefill and steps go through the cache: as many tokens as were announced."""
    from qcli.inference.load import load_model
    from qcli.models.open import open_source

    source = open_source(str(model))
    loaded = load_model(source, torch.device("cpu"), torch.float32)
    lengths: list[int] = []
    forward = loaded.forward

    def counted(**arguments: Any) -> Any:
        lengths.append(arguments["input_ids"].shape[1])
        return forward(**arguments)

    loaded.forward = counted
    bench._Arm(source, loaded, torch.device("cpu")).measure(torch.ones(2, 7, dtype=torch.int64), 4)
    assert lengths == [7, 1, 1, 1]
