"""The strict YAML reader: YAML 1.2 scalars, places, and what it refuses."""

from __future__ import annotations

import math

import pytest

from qcli.recipe.yaml import MAX_BYTES, dotted, read_yaml
from qcli.utils.errors import UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("007", 7),
        ("0x1f", 31),
        ("0o17", 15),
        ("-3", -3),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("'4'", "4"),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("[1, two]", [1, "two"]),
        ("9" * 5000, math.inf),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert read_yaml(f"key: {text}", "r.yaml").data == {"key": value}


def test_places_are_those_of_keys_and_items() -> None:
    document = read_yaml("a: 1\nb: {c: 2, d: [x,\n  y]}\n", "r.yaml")
    assert document.places == {
        ("a",): (1, 1),
        ("b",): (2, 1),
        ("b", "c"): (2, 5),
        ("b", "d"): (2, 11),
        ("b", "d", 0): (2, 15),
        ("b", "d", 1): (3, 3),
    }


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: 1\na: 2", (2, 1), "given twice; first on line 1"),
        ("a: &x 1", (1, 4), "anchors (&x)"),
        ("a: *x", (1, 4), "aliases (*x)"),
        ("a: !!python/name:os.system 1", (1, 4), "tags"),
        ("1: a", (1, 1), "a key must be text"),
        ("? [a]\n: 1", (1, 3), "a key must be text"),
    ],
)
def test_refused_but_read_on(text: str, place: tuple[int, int], words: str) -> None:
    (problem,) = read_yaml(text, "r.yaml").problems
    assert problem.place == place
    assert words in problem.message


def test_first_of_duplicates_stays_and_places_are_its() -> None:
    document = read_yaml("a: {b: 1}\na: {b: 2}", "r.yaml")
    assert document.data == {"a": {"b": 1}}
    assert document.places["a", "b"] == (1, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "r.yaml:1:9: not valid YAML"),
        ("a: 1\n\tb: 2", "r.yaml:2:1: not valid YAML"),
        ("a: 1\n---\nb: 2", "r.yaml:2:1: a second document"),
        ("[" * 60000, "r.yaml:1:18: nested more than 16 levels"),
        ("a: \x00", "r.yaml: not valid YAML"),
        ("#" * (MAX_BYTES + 1), "r.yaml: larger than 64 KiB"),
    ],
)
def test_not_readable_at_all(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_yaml(text, "r.yaml")
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message


def test_unquoted_patterns_are_explained() -> None:
    (problem,) = read_yaml("match: *.down_proj", "r.yaml").problems
    assert problem.message.endswith("quote text that starts with *")
    with pytest.raises(UsageError) as caught:
        read_yaml("match: *", "r.yaml")
    assert caught.value.hint == "quote text that starts with *"


def test_dotted_paths() -> None:
    assert dotted(("overrides", 0, "method", "bits")) == "overrides[0].method.bits"
