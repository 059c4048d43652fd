"""A short run of the campaigns of mutations, and what they rest on."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from tests.faults.campaigns.mutations import change
from tests.faults.mutations import Mutation, drawn, mutate
from tests.faults.registry import all_campaigns
from tests.faults.subjects import SUBJECTS, Subject, kitchen

pytestmark = pytest.mark.xdist_group("faults")


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUBJECTS)
def test_campaigns_find_nothing(kind: str, tmp_path: Path) -> None:
    trials = all_campaigns()[f"mutated {kind}"](Random(1), tmp_path)
    assert [trial for trial in islice(trials, 12) if trial.problem is not None] == []


@pytest.mark.slow
def test_silent_damage_and_bugs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: what must not be is noticed."""
    here = kitchen()
    evaluation = ("eval", "student", "--data", "text.txt", "--window", "32", "-q", "--json")  # which checks no hash
    subject = Subject(evaluation, ("student", "text.txt"), ("student/*.safetensors",), sealed=True)
    bits = [Mutation("bit", place, 6, None) for place in range(30_000, 40_000, 1_000)]
    found = [trial.problem for bit in bits if (trial := change(here, subject, Random(1), bit)) is not None]
    assert "silent damage" in found, found
    ended = here.run(evaluation, counted=False)
    for code, err, problem in (
        (1, "error: KeyError: x", "exit 1"),
        (None, "", "hang"),
        (-11, "", "other"),
        (2, "error: \x1b[31m", "other"),
        (2, "hint: only", "other"),
        (0, "Loading: 100%", "other"),
    ):
        monkeypatch.setattr(here, "run", lambda *_, code=code, err=err, **__: ended._replace(code=code, err=err))
        trial = change(here, subject, Random(1), bits[0])
        assert trial is not None and trial.problem == problem


def test_equal_seeds_draw_equal_mutations() -> None:
    first, again, other = (list(islice(drawn(Random(seed)), 300)) for seed in (1, 1, 2))
    assert first == again != other
    assert {mutation.kind for mutation in first} >= {"bit", "another value", "fifo", "exchanged", "twice"}


@pytest.mark.parametrize("kind", ["another value", "nothing", "another name", "one more", "twice", "exchanged"])
def test_structure_changes_and_stays_json(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    changed = set()
    for place in range(40):
        file.write_text('{"a": [1, {"b": 2}], "c": {"d": 3, "e": 4}}')
        if mutate(file, Mutation(kind, place, place, 5)):
            changed.add(file.read_text())
    assert len(changed) > 3
    for text in changed:
        json.loads(text)


def test_values_reach_headers_and_rows(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "F32"}}'
    shard, lines = tmp_path / "file.safetensors", tmp_path / "file.jsonl"
    shard.write_bytes(len(header).to_bytes(8, "little") + header + b"data")
    assert mutate(shard, Mutation("another value", 0, 0, None))
    assert shard.read_bytes() == (11).to_bytes(8, "little") + b'{"a": null}' + b"data"
    lines.write_text('{"a": 1}\n{"b": 2}\n')
    assert mutate(lines, Mutation("another value", 0, 1, None))
    assert lines.read_text() == '{"a": 1}\n{"b": null}\n'
