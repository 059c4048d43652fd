"""The licence of a model goes from its card into the cards of what is made from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from qcli.export.pack import pack
from qcli.models.license import license_of
from tests.quantizing import run
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: 'my-license'\nlicense_link: https://host/a/LICENSE.md\n---\n# A",
            {"license": "other", "license_name": "my-license", "license_link": "https://host/a/LICENSE.md"},
        ),
        ('---\r\nlicense: "mit"\r\n---\r\n', {"license": "mit"}),
        ('---\nlicense: other\nlicense_name: a b\nlicense_link: x"y: [1]\n---\n', {"license": "other"}),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_only_fields_of_the_front_matter_in_the_form_of_the_hub(
    card: str, expected: dict[str, str] | None, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert license_of(tmp_path) == expected


def test_a_folder_without_a_card_names_none(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None


def test_it_is_in_the_cards_of_checkpoint_and_export(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\ntags: [x]\n---\n# Tiny\n")
    run(model, tmp_path / "native", method__name="rtn")
    pack(tmp_path / "native", tmp_path / "packed", format="awq", shard_size=10**9)
    for folder, tags in (("native", ["quantized", "qcli"]), ("packed", ["quantized", "qcli", "awq"])):
        _, front, _ = (tmp_path / folder / "README.md").read_text().split("---\n", 2)
        fields = YAML(typ="safe", pure=True).load(front)
        assert (fields["license"], fields["license_name"], fields["tags"]) == ("other", "tiny", tags)
