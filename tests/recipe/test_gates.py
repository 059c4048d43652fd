"""Quality gates: which models pass, and the messages for those that fail."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from qcli.recipe.gates import GateError, Gates, require

EVALUATION: dict[str, Any] = {
    "model": "small",
    "kl": 0.2,
    "perplexity": {
        "a": {"value": 12.0, "worst_window": 0, "worst_window_kl": 0.3},
        "b": {"value": 30.0, "worst_window": 7, "worst_window_kl": 4.5},
    },
    "baseline": {"perplexity": {"a": 10.0, "b": 20.0}},
    "tasks": {"easy": {"score": 0.5, "baseline": 0.6}, "hard": {"score": 0.3, "baseline": 0.31}},
}


@pytest.mark.parametrize(
    ("gates", "failures"),
    [
        ({"max_kl": 0.2}, []),
        ({"max_kl": 0.19}, ["max_kl 0.19: KL is 0.2"]),
        ({"max_window_kl": 4.5}, []),
        ({"max_window_kl": 4}, ["max_window_kl 4: KL is 4.5 in window 7 of b"]),
        ({"max_ppl_ratio": 1.5}, []),
        ({"max_ppl_ratio": 1.3}, ["max_ppl_ratio 1.3: the ratio on b is 1.5"]),
        (
            {"max_ppl_ratio": 1.1},
            ["max_ppl_ratio 1.1: the ratio on a is 1.2", "max_ppl_ratio 1.1: the ratio on b is 1.5"],
        ),
        ({"min_task": {"easy": 0.5, "hard": 0.3}}, []),
        ({"min_task": {"easy": 0.51}}, ["min_task easy=0.51: its score is 0.5"]),
        ({"max_task_drop": 0.11}, []),
        ({"max_task_drop": 0.05}, ["max_task_drop 0.05: easy lost 0.1"]),
    ],
    ids=str,
)
def test_bounds(gates: dict[str, Any], failures: list[str]) -> None:
    bounds = Gates(**gates)
    assert list(bounds.failures(EVALUATION)) == failures
    assert bounds.needs_baseline == ("min_task" not in gates)
    if failures:
        with pytest.raises(GateError) as caught:
            require(bounds, [EVALUATION])
        assert caught.value.exit_code == 4
        assert caught.value.message.splitlines() == [f"small: gate {failure}" for failure in failures]
    else:
        require(bounds, [EVALUATION])


def test_what_is_not_finite_passes_no_gate() -> None:
    text = {"value": None, "worst_window": 0, "worst_window_kl": None}
    lost = EVALUATION | {"kl": None, "perplexity": {"a": text, "b": text}}
    lost["tasks"] = {"easy": {"score": float("nan"), "baseline": 0.6}}
    gates = Gates(max_kl=1e9, max_window_kl=1e9, max_ppl_ratio=1e9, min_task={"easy": 0.0}, max_task_drop=1.0)
    assert [failure.partition(" ")[0] for failure in gates.failures(lost)] == [
        *("max_kl", "max_window_kl", "max_window_kl", "max_ppl_ratio", "max_ppl_ratio", "min_task", "max_task_drop")
    ]


def test_a_baseline_without_a_perplexity_passes_no_gate() -> None:
    lost = EVALUATION | {"baseline": {"perplexity": {"a": None, "b": 20.0}}}
    assert list(Gates(max_ppl_ratio=1e9).failures(lost)) == ["max_ppl_ratio 1e+09: the ratio on a is not finite"]


def test_no_gate_is_a_mistake() -> None:
    with pytest.raises(ValidationError, match="names no gate"):
        Gates()


def test_where_lower_is_better_a_rise_is_the_loss() -> None:
    prose = {"metric": "word_perplexity", "score": 400.0, "baseline": 20.0, "higher_is_better": False}
    worse, better = EVALUATION | {"tasks": {"prose": prose}}, EVALUATION | {"tasks": {"prose": prose | {"score": 2.0}}}
    drop = Gates(max_task_drop=1.0)
    assert list(drop.failures(worse)) == ["max_task_drop 1: prose lost 380"]
    assert list(drop.failures(better)) == []
    assert list(Gates(min_task={"prose": 3.0}).failures(worse)) == [
        "min_task prose=3: it bounds scores where higher is better, not word_perplexity"
    ]


def test_a_task_without_a_score_fails_its_gate() -> None:
    assert list(Gates(min_task={"group": 0.1}).failures(EVALUATION)) == ["min_task group=0.1: it has no score"]


def test_verdicts_say_what_was_measured() -> None:
    gates = Gates(max_kl=0.19, max_ppl_ratio=1.3, min_task={"easy": 0.5, "group": 0.1})
    assert [verdict.to_json() for verdict in gates.verdicts(EVALUATION)] == [
        {"name": "max_kl", "of": None, "limit": 0.19, "value": 0.2, "ok": False},
        {"name": "max_ppl_ratio", "of": "a", "limit": 1.3, "value": 1.2, "ok": True},
        {"name": "max_ppl_ratio", "of": "b", "limit": 1.3, "value": 1.5, "ok": False},
        {"name": "min_task", "of": "easy", "limit": 0.5, "value": 0.5, "ok": True},
        {"name": "min_task", "of": "group", "limit": 0.1, "value": None, "ok": False},
    ]
