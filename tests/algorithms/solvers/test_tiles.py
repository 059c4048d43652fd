"""How many numbers are worked on at a time."""

from __future__ import annotations

import pytest

from qcli.algorithms.solvers import tiles


def test_small_tensors_of_a_kind_are_joined_and_large_ones_stay_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_TOGETHER", 10)
    sizes = [("a", 1, 4), ("b", 2, 5), ("c", 1, 6), ("d", 1, 1), ("e", 2, 5), ("f", 1, 50), ("g", 1, 1)]
    joined = [(1, ["a", "c"]), (2, ["b", "e"]), (1, ["d"]), (1, ["f"]), (1, ["g"])]
    assert [*tiles.together(sizes)] == joined
