"""The figure of layer errors."""

from __future__ import annotations

from typing import Any

import pytest

from qcli.evaluation.layer_plot import plot_errors

BLOCKS: list[dict[str, Any]] = [
    {
        "block": number,
        "own": 0.1,
        "accumulated": 0.1 * number,
        "layers": {"q_proj": 0.0, "experts.0.up": 0.1, "experts.1.up": 0.3},
    }
    for number in range(3)
]


@pytest.mark.parametrize("blocks", [BLOCKS, [{"block": 0, "own": 0.0, "accumulated": 0.0, "layers": {"q_proj": 0.0}}]])
def test_errors_are_drawn_whatever_they_are(blocks: list[dict[str, Any]]) -> None:
    """Also where a model is as good as its baseline and no logarithm exists."""
    drawn = plot_errors(blocks, "$mine$", "theirs", ".svg").decode()
    assert drawn == plot_errors(blocks, "$mine$", "theirs", ".svg").decode()
    assert "$mine$, compared with theirs" in drawn and "accumulated" in drawn and "q_proj" in drawn
    assert ("experts.*.up" in drawn) is (len(blocks) > 1) and "experts.0.up" not in drawn
    assert (
        plot_errors(blocks, "a", "b", ".png")[:4] == b"\x89PNG" and plot_errors(blocks, "a", "b", ".pdf")[:4] == b"%PDF"
    )
