"""Model folders: what is read from them, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qcli.models.families import FAMILIES, Linear
from qcli.models.open import open_source
from qcli.utils.errors import QcliError, ResourceError, UnsupportedError, UsageError, expected
from qcli.utils.trust import Trust
from tests.tiny import HIDDEN, VOCAB, tiny_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def edit_config(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_weights(path: Path, change: Any) -> None:
    """Apply `change` to the dict of tensors of a folder with one shard."""
    tensors = load_file(path / WEIGHTS)
    save_file(change(tensors) or tensors, path / WEIGHTS, {"format": "pt"})


def shard(path: Path) -> list[str]:
    """Split the weights into two shards with an index; their names."""
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, chosen in shards.items():
        save_file({name: tensors[name] for name in chosen}, path / file, {"format": "pt"})
    weight_map = {name: file for file, chosen in shards.items() for name in chosen}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return list(shards)


def edit_index(path: Path, **entries: str) -> None:
    index = json.loads((path / INDEX).read_text())
    index["weight_map"] |= entries
    (path / INDEX).write_text(json.dumps(index))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_and_values_are_those_of_the_causal_lm(model_type: str, tmp_path: Path) -> None:
    path = tiny_model(model_type, tmp_path, tie_word_embeddings=False)
    auto: Any = AutoModelForCausalLM
    expected = auto.from_pretrained(path, dtype=torch.float32).state_dict()
    source = open_source(str(path))
    assert {name: stored.shape for name, stored in source.tensors().items()} == {
        name: tuple(value.shape) for name, value in expected.items()
    }
    for name, tensor in source.read(source.tensors()).items():
        assert torch.equal(tensor, expected[name])
    assert source.leftovers() == []


def test_linears_come_in_order_with_their_logical_shape(tmp_path: Path) -> None:
    linears = open_source(str(tiny_model("gpt2", tmp_path))).linears()
    assert linears[:4] == [
        Linear("transformer.h.0.attn.c_attn", 0, 0, (3 * HIDDEN, HIDDEN)),
        Linear("transformer.h.0.attn.c_proj", 0, 1, (HIDDEN, HIDDEN)),
        Linear("transformer.h.0.mlp.c_fc", 0, 2, (4 * HIDDEN, HIDDEN)),
        Linear("transformer.h.0.mlp.c_proj", 0, 3, (HIDDEN, 4 * HIDDEN)),
    ]
    assert [linear.block for linear in linears] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(("model_type", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("llama", "model.")])
def test_checkpoints_of_the_base_model_get_its_prefix(model_type: str, prefix: str, tmp_path: Path) -> None:
    path = tiny_model(model_type, tmp_path, tie_word_embeddings=True)
    expected = open_source(str(path)).tensors()
    edit_weights(path, lambda tensors: {name.removeprefix(prefix): t for name, t in tensors.items()})
    assert open_source(str(path)).tensors() == expected


def test_gemma3_with_vision_is_read_under_all_its_names(tmp_path: Path) -> None:
    path = tiny_model("gemma3", tmp_path)
    expected = open_source(str(path)).tensors()
    old = "vision_tower.vision_model."
    edit_weights(path, lambda tensors: {n.replace("vision_tower.", old): t for n, t in tensors.items()})
    assert open_source(str(path)).tensors() == expected


def test_computed_tables_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    path = tiny_model("gpt2", tmp_path)
    expected = open_source(str(path)).tensors()
    mask = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.0.attn.masked_bias": torch.ones(()),
    }
    edit_weights(path, lambda tensors: tensors.update(mask))
    assert open_source(str(path)).tensors() == expected


def test_shards_are_read_as_one(llama: Path) -> None:
    whole = open_source(str(llama))
    tensors = whole.read(whole.tensors())
    shard(llama)
    sharded = open_source(str(llama))
    assert sharded.tensors() == whole.tensors()
    assert all(torch.equal(tensors[name], value) for name, value in sharded.read(tensors).items())


def test_links_to_a_cache_are_followed(llama: Path, tmp_path: Path) -> None:
    blob = (llama / WEIGHTS).rename(tmp_path / "blob")
    (llama / WEIGHTS).symlink_to(blob)
    assert len(open_source(str(llama)).linears()) == 14


def test_bits_and_bytes_are_those_stored(llama: Path) -> None:
    edit_weights(
        llama,
        lambda tensors: {name: t.bfloat16() if "_proj" in name else t for name, t in tensors.items()},
    )
    source = open_source(str(llama))
    assert source.bits_per_weight() == 16
    assert 16 < source.model_bits_per_weight() < 32
    assert source.bytes() == (llama / WEIGHTS).stat().st_size


def test_headers_need_no_torch(llama: Path) -> None:
    code = (
        "import sys; from qcli.models.open import open_source; source = open_source(sys.argv[1]);"
        "source.tensors(), source.linears(), source.fingerprint(), source.bits_per_weight();"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, llama], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_fingerprint_follows_the_model_not_the_place(llama: Path, tmp_path: Path) -> None:
    fingerprint = open_source(str(llama)).fingerprint()
    assert open_source(str(llama.rename(tmp_path / "elsewhere"))).fingerprint() == fingerprint
    other = tiny_model("llama", tmp_path, rms_norm_eps=1e-3)
    assert open_source(str(other)).fingerprint() != fingerprint


def test_companions_are_copied_verbatim_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    (llama / "modeling_evil.py").write_text("raise SystemExit")
    out = tmp_path / "out"
    out.mkdir()
    open_source(str(llama)).copy_companions(out)
    names = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {file.name for file in out.iterdir()} == names
    assert all((out / name).read_bytes() == (llama / name).read_bytes() for name in names)


def test_the_tokenizer_encodes_any_text(llama: Path) -> None:
    tokenizer = open_source(str(llama)).tokenizer()
    ids = tokenizer("A ß 漢", add_special_tokens=False).input_ids
    assert len(ids) == len("A ß 漢".encode()) and max(ids) < VOCAB
    assert tokenizer.decode(ids) == "A ß 漢"


def refused(path: Path | str, kind: type[QcliError], message: str) -> None:
    """Opening `path`, or listing its layers, fails with one line that matches `message`, and a hint."""
    with pytest.raises(kind, match=message) as raised:
        open_source(str(path)).linears()
    assert "\n" not in raised.value.message
    assert raised.value.hint or kind is UnsupportedError


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", UsageError, "nothing does not exist")
    refused("nothing.gguf", UsageError, "does not exist")


def test_a_hub_id_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("some-org/some-model", UsageError, "model is not a local folder, HF_HUB_OFFLINE is set, and")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    missing = LocalEntryNotFoundError("no network")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(missing))
    refused("some-org/some-model", UsageError, "some-org/some-model is not a local folder, and the hub cannot")


@pytest.mark.parametrize("trusted", [False, True])
def test_what_is_downloaded_from_the_hub(
    trusted: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"config.json", "model.safetensors", "tokenizer.model", "qwen.tiktoken", "LICENSE", "License.txt", "NOTICE"}
    kept |= {"chat_template.jinja", "additional_chat_templates/tool_use.jinja", "merges.txt"}
    code = {"modeling.py", "custom_generate/generate.py"}
    other = {"pytorch_model.bin", "original/model.safetensors", "onnx/config.json", "README.png", "tokenizer.pkl"}
    fetched: set[str] = set()
    snapshot = tmp_path / "0123abc"

    def snapshot_download(model: str, revision: str | None = None, **patterns: Any) -> str:
        assert revision in (None, snapshot.name)
        fetched.update(filter_repo_objects(kept | code | other, **patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    llama.rename(snapshot)
    assert len(open_source("org/name", Trust(remote_code=trusted)).linears()) == 14
    assert fetched == kept | (code if trusted else set())


class Hub:
    """Stands in for the hub: one repository of GGUF files, and what was fetched of it."""

    def __init__(self, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files, self.fetched, self.revisions = files, set[str](), set[str | None]()
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)

    def names(self) -> list[str]:
        return [str(file.relative_to(self.files)) for file in self.files.rglob("*") if file.is_file()]

    def download(self, repository: str, revision: str | None = None, **patterns: Any) -> str:
        assert repository == "org/name"
        self.revisions.add(revision)
        self.fetched.update(filter_repo_objects(self.names(), **patterns))
        return str(self.files)

    def list_repo_files(self, repository: str, revision: str) -> list[str]:
        return self.names()


def test_gguf_repositories_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    from tests.models.test_gguf import write_gguf

    (tmp_path / "work").mkdir()
    files = tmp_path / "0123abc"
    (files / "big").mkdir(parents=True)
    write_gguf(tmp_path / "work").rename(files / "name-Q8_0.gguf")
    (files / "mmproj-name.gguf").write_text("a projector")
    hub = Hub(files, monkeypatch)
    source = open_source("org/name")
    assert source.path == files / "name-Q8_0.gguf"
    assert source.hub == ("org/name", "0123abc")
    assert hub.fetched == {"name-Q8_0.gguf"}

    hub.fetched.clear()
    for file in tmp_path.glob("work/*"):
        shutil.rmtree(file)
    write_gguf(tmp_path / "work", split_max_tensors=16)
    for file in tmp_path.glob("work/*.gguf"):
        file.rename(files / "big" / file.name)
    with pytest.raises(UsageError, match="org/name has 2 GGUF models") as caught:
        open_source("org/name")
    assert caught.value.hint is not None
    assert "as in org/name/big/tiny-00001-of-00002.gguf" in caught.value.hint
    assert "mmproj" not in caught.value.hint
    assert not hub.fetched
    big = open_source("org/name/big/tiny-00002-of-00002.gguf@v1")
    assert big.weight_files() == sorted((files / "big").glob("*.gguf"))
    assert hub.fetched == {f"big/tiny-0000{n}-of-00002.gguf" for n in (1, 2)}
    assert "v1" in hub.revisions
    refused("org/name/other.gguf", UsageError, r"org/name on the hub has no file other\.gguf")


def test_a_folder_with_one_gguf_model_is_that_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.models.test_gguf import write_gguf

    write_gguf(tmp_path)
    assert open_source(str(tmp_path)).path == tmp_path / "tiny.gguf"
    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "other.gguf")
    refused(tmp_path, UsageError, "has 2 GGUF models")


def test_a_revision_of_a_hub_model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama.rename(tmp_path / "0123abc")
    hub = Hub(tmp_path / "0123abc", monkeypatch)
    assert open_source("org/name@refs/pr/3").hub == ("org/name", "0123abc")
    assert hub.revisions == {"refs/pr/3", "0123abc"}
    assert open_source(str(tmp_path / "0123abc")).hub is None
    refused(f"{tmp_path / '0123abc'}@main", UsageError, "is not a hub id, it has no revision main")


def test_a_file_that_is_no_gguf_is_refused(llama: Path) -> None:
    refused(llama / WEIGHTS, UsageError, "is neither a folder nor a .gguf file")


def test_missing_and_broken_configs_are_refused(llama: Path) -> None:
    (llama / "config.json").write_text('{"model_type": ')
    refused(llama, UsageError, r"config\.json is not valid JSON")
    (llama / "config.json").write_text("[]")
    refused(llama, UsageError, r"config\.json is not a JSON object")
    (llama / "config.json").unlink()
    refused(llama, UsageError, r"config\.json is missing")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX])
def test_files_without_an_end_are_refused_before_they_are_read(name: str, llama: Path) -> None:
    (llama / name).unlink(missing_ok=True)
    os.mkfifo(llama / name)
    refused(llama, UsageError, f"{name} is not a regular file")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_with_half_a_character_is_refused(name: str, llama: Path) -> None:
    (llama / name).write_text('{"weight_map": {"a": "\\ud800.safetensors"}}')
    refused(llama, UsageError, f"{name} is not valid JSON")


def test_a_config_that_transformers_rejects_is_one_line(llama: Path) -> None:
    edit_config(llama, hidden_size="wide")
    with pytest.raises(UsageError, match=r"config\.json: ") as raised:
        open_source(str(llama)).hf_config()
    assert "\n" not in raised.value.message


def test_errors_of_the_machine_are_not_blamed_on_the_model(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(llama))

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "config.json")

    monkeypatch.setattr("qcli.models.folder.pretrained", fail)
    for read in (source.hf_config, source.tokenizer):
        with pytest.raises(OSError) as caught:
            read()
        assert isinstance(expected(caught.value), ResourceError)


def test_models_in_encodings_that_are_not_read_are_refused(llama: Path) -> None:
    edit_config(llama, quantization_config={"quant_method": "aqlm", "bits": 2})
    refused(llama, UnsupportedError, r"already quantized \(aqlm\), which qcli does not read")
    edit_config(llama, quantization_config={})
    refused(llama, UnsupportedError, r"already quantized \(unnamed method\)")
    edit_config(llama, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(llama, UsageError, "weights are stored as gptq, and none of them is")


def test_pickled_weights_are_refused(llama: Path) -> None:
    (llama / WEIGHTS).rename(llama / "pytorch_model.bin")
    refused(llama, UsageError, r"only pickled weights \(pytorch_model\.bin\)")


def test_a_folder_without_weights_is_refused(llama: Path) -> None:
    (llama / WEIGHTS).unlink()
    refused(llama, UsageError, "has neither")


def test_missing_and_truncated_shards_are_refused(llama: Path) -> None:
    _, second = shard(llama)
    whole = (llama / second).read_bytes()
    (llama / second).write_bytes(whole[:-1])
    refused(llama, UsageError, f"{second} is truncated or broken")
    (llama / second).unlink()
    refused(llama, UsageError, f"{second} is missing")


@pytest.mark.parametrize(
    "target",
    ["../outside.safetensors", "/tmp/outside.safetensors", "sub/x.safetensors", "..\\x.safetensors", "x.bin"],
)
def test_an_index_that_points_elsewhere_is_refused(target: str, llama: Path) -> None:
    shard(llama)
    edit_index(llama, **{"model.norm.weight": target})
    refused(llama, UsageError, "not a safetensors file in the model's folder")


def test_an_index_that_is_wrong_about_a_shard_is_refused(llama: Path) -> None:
    first, _ = shard(llama)
    edit_index(llama, invented=first)
    refused(llama, UsageError, f"{first} has no tensor invented")


def test_a_tensor_in_two_shards_is_refused(llama: Path) -> None:
    first, second = shard(llama)
    tensors = load_file(llama / second)
    name = next(iter(load_file(llama / first)))
    save_file({**tensors, name: torch.ones(1)}, llama / second, {"format": "pt"})
    refused(llama, UsageError, f"{name} is in both ")


def test_an_index_without_a_map_is_refused(llama: Path) -> None:
    shard(llama)
    (llama / INDEX).write_text("{}")
    refused(llama, UsageError, "has no weight_map")


def test_missing_weights_are_named(llama: Path) -> None:
    gone = "model.layers.1.mlp.up_proj.weight"
    edit_weights(llama, lambda tensors: {name: t for name, t in tensors.items() if name != gone})
    refused(llama, UsageError, f"has no tensor {gone}")
    with pytest.raises(UsageError, match=f"has no tensor {gone}"):
        open_source(str(llama)).read([gone])


def test_weights_a_row_does_not_know_are_refused_not_skipped(llama: Path) -> None:
    extra = {"model.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 4, 4)}
    edit_weights(llama, lambda tensors: tensors.update(extra))
    assert open_source(str(llama)).leftovers() == list(extra)
    refused(llama, UnsupportedError, "model.layers.0.mlp.experts.gate_up_proj")


def test_blocks_beyond_those_announced_are_refused(llama: Path) -> None:
    edit_config(llama, num_hidden_layers=1)
    refused(llama, UnsupportedError, "model.layers.1.")


def test_weights_in_eight_bits_are_refused(llama: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(llama, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    refused(llama, UnsupportedError, f"{name} is stored as F8_E4M3")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_when_read(value: float, dtype: torch.dtype, llama: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][3, 7] = value

    edit_weights(llama, poison)
    with pytest.raises(UsageError, match=f"{name} holds NaN or infinity"):
        open_source(str(llama)).read([name])
