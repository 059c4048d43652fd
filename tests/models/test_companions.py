"""What is copied beside the weights: files of known names that lie in the model's own folder, and no code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qcli.models.companions import code_files, companions
from qcli.models.open import open_source
from qcli.utils.errors import UsageError
from qcli.utils.trust import Trust
from tests.models.test_pretrained import edit
from tests.tiny import tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path)


def names(folder: Path) -> set[str]:
    return set(companions(folder, trusted=False))


def copied(folder: Path, *, trusted: bool = False) -> Path:
    out = folder.parent / f"copy-{trusted}"
    out.mkdir()
    open_source(str(folder), Trust(remote_code=trusted)).copy_companions(out)
    return out


def test_tokenizers_templates_processors_and_licences_go_along(model: Path) -> None:
    more = [
        *("LICENSE", "License.txt", "LICENCE.md", "NOTICE", "THIRD_PARTY_NOTICES.txt", "USE_POLICY.md"),
        *("qwen.tiktoken", "tekken.json", "spiece.model", "tokenizer.model.v3", "vocab.bpe", "params.json"),
        *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "chat_template.json"),
        "additional_chat_templates/tool_use.jinja",
    ]
    before = names(model)
    (model / "additional_chat_templates").mkdir()
    for name in more:
        (model / name).write_text("{}")
    assert names(model) == before | {*more}
    out = copied(model)
    assert all((out / name).read_text() == "{}" for name in more)


def test_everything_else_stays_behind(model: Path) -> None:
    before = names(model)
    for name in (
        *("modeling.py", "LICENSE.py", "README.md", "credentials.json", ".env", "adapter_config.json", "vocab.bak"),
        *("pytorch_model.bin", "optimizer.pt", "tokenizer_notes", "notice\x1b[31m.txt", "tokenizer.pkl"),
    ):
        (model / name).write_text("x")
    assert names(model) == before


@pytest.mark.parametrize("name", ["tokenizer.model", "LICENSE", "additional_chat_templates/rag.jinja"])
def test_links_out_of_the_folder_are_not_followed(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hf_SECRET")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match=f"{name} is a link out of the model's folder") as refused:
        companions(model, trusted=False)
    assert refused.value.hint


def test_a_folder_of_templates_elsewhere_is_not_followed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text("x")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    assert not any("jinja" in name and "/" in name for name in names(model))


def test_links_into_the_models_own_hub_cache_are_followed(model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub/models--org--name/snapshots/abc", tmp_path / "hub/models--org--name/blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    out = copied(snapshot)
    assert (out / "tokenizer.json").is_file() and not (out / "tokenizer.json").is_symlink()
    (snapshot / "LICENSE").symlink_to("../../../models--org--other/blobs/0")
    (tmp_path / "hub/models--org--other/blobs").mkdir(parents=True)
    (tmp_path / "hub/models--org--other/blobs/0").write_text("x")
    with pytest.raises(UsageError, match="LICENSE is a link out of the model's folder"):
        companions(snapshot, trusted=False)


def test_what_cannot_be_a_companion_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(model / "vocab.txt")
    with pytest.raises(UsageError, match=r"vocab\.txt is no regular file"):
        companions(model, trusted=False)
    (model / "vocab.txt").unlink()
    (model / "vocab.txt").symlink_to("vocab.txt")
    with pytest.raises(UsageError, match=r"vocab\.txt is a link that leads nowhere"):
        companions(model, trusted=False)
    (model / "vocab.txt").unlink()
    monkeypatch.setattr("qcli.models.companions._MAX_BYTES", 100)
    with pytest.raises(UsageError, match="more than any file of its kind"):
        companions(model, trusted=False)


def test_names_of_code_go_only_with_the_code(model: Path) -> None:
    (model / "code.py").write_text("from .parts import P\n")
    (model / "parts.py").write_text("class P: pass\n")
    (model / "unrelated.py").write_text("")
    nested = {"image_processor": {"auto_map": {"AutoImageProcessor": "code.I"}, "size": 3}}
    edit(model / "processor_config.json", **nested)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]}, name_or_path="/home/me/model")
    edit(model / "config.json", auto_map={"AutoConfig": "code.C"}, custom_pipelines={"x": {"impl": "code.X"}})
    without, with_code = open_source(str(model)), open_source(str(model), Trust(remote_code=True))
    assert "auto_map" not in without.config_to_write() and "custom_pipelines" not in without.config_to_write()
    assert with_code.config_to_write() == with_code.config
    assert not list(copied(model).rglob("*.py"))
    out = model.parent / "copy-False"
    assert json.loads((out / "processor_config.json").read_text()) == {"image_processor": {"size": 3}}
    assert not {"auto_map", "name_or_path"} & json.loads((out / "tokenizer_config.json").read_text()).keys()
    assert set(code_files(model)) == {"code.py", "parts.py"}


@pytest.mark.parametrize("reference", ["../evil.C", "/etc/evil.C", "a.b.C", "gone.C"])
def test_code_outside_of_the_folder_is_no_code_of_the_model(reference: str, model: Path) -> None:
    edit(model / "config.json", auto_map={"AutoConfig": reference})
    with pytest.raises(UsageError, match=r"as code, which is no class|has no gone\.py"):
        code_files(model)


def test_a_vocabulary_that_only_the_code_knows_goes_with_it(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "words.json")
    (model / "code.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class T(PreTrainedTokenizerFast):\n    vocab_files_names = {'tokenizer_file': 'words.json'}\n"
    )
    edit(model / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": [None, "code.T"]})
    assert "words.json" not in names(model)
    out = copied(model, trusted=True)
    assert {"words.json", "code.py"} <= {file.name for file in out.iterdir()}
