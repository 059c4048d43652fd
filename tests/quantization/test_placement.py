"""Where activations wait changes nothing but memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.quantizing import keep_on_host, run, weights, write_text
from tests.tiny import tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"method__name": "teq", "method__steps": 2, "refine__steps": 2}], ids=str)
def test_activations_in_host_memory_give_the_same_bytes(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny_model("llama", tmp_path), write_text(tmp_path)
    run(model, tmp_path / "out", text, **flags)
    expected = weights(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "device")
    used = keep_on_host(monkeypatch)
    run(model, tmp_path / "out", text, **flags)
    assert len(used) == 1
    assert weights(tmp_path / "out") == expected
