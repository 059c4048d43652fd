"""The Triton kernels compiled ahead of time for real chips, which needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_fit_their_chip(arch: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.compiled", "--json", "--arch", str(arch), "--rows", "1,16"]
    formats = ["--formats", "4 bits,2 bits,onebit"]
    done = subprocess.run([*command, *formats], env=environment, capture_output=True, text=True, check=True)
    results = {
        (entry.get("format", number), entry["kernel"]): entry for number, entry in enumerate(json.loads(done.stdout))
    }
    trained = {"round_block", "quantize_rows", "gradients_of_rows", "look_up_rows", "gradients_of_look_up"}
    trained |= {"sign_rows", "gradients_of_signs"}
    assert {kernel for _, kernel in results} == {"gemv", "arrange", "matmul", "collect", *trained}
    for (name, kernel), entry in results.items():
        assert entry["spilled_bytes"] == 0, (name, kernel)
        if kernel == "gemv":  # below, fewer than 12 warps fit into a processor
            assert entry["registers"] <= 168, name
        if kernel in trained:
            assert entry["registers"] <= 128, name
        assert entry["tensor_cores"] == (kernel == "matmul"), (name, kernel)
    assert results["4 bits", "gemv"]["widest_load"].endswith("128")
