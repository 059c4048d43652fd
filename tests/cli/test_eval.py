"""`qcli eval`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Invoke


def test_json_holds_the_protocol_and_the_losses(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    assert invoke("quantize", model, "--method", "rtn", "--bits", 8, "--out", small).code == 0
    flags = ("--data", text, "--window", 64, "--max-windows", 4)
    code, out, _ = invoke("eval", small, "--baseline", model, *flags, "--json")
    assert code == 0
    found = json.loads(out)
    score = found["perplexity"][str(text)]
    assert {key: score[key] for key in ("window", "stride", "bos", "windows", "tokens")} == {
        "window": 64,
        "stride": 64,
        "bos": False,
        "windows": 4,
        "tokens": 4 * 63,
    }
    assert 0 <= found["kl"] < 1e-3
    assert found["top1_agreement"] > 0.9
    assert 8 < found["bits_per_weight"] < 9 < found["model_bits_per_weight"]
    assert found["bytes"] == sum(file.stat().st_size for file in small.glob("*.safetensors"))


def test_table_and_errors(invoke: Invoke, model: Path, text: Path) -> None:
    code, out, _ = invoke("eval", model, "--data", text, "--window", 64, "--max-windows", 2)
    assert code == 0
    assert "perplexity" in out
    assert "KL" not in out
    code, out, err = invoke("eval", model, "--data", "wikitext", "--json")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "wikitext2" in err
