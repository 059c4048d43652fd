"""Open a model by its folder, hub id, or GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qcli.models import decoded
from qcli.models.companions import CHAT_TEMPLATES, tokenizer_files
from qcli.models.folder import FolderSource, quant_method, read_config
from qcli.models.gguf import GGUFSource, is_later_part, part_names, parts
from qcli.models.manifest import MANIFEST, Manifest
from qcli.models.native import NativeSource
from qcli.models.source import HubModel, ModelSource, first_line
from qcli.utils import registry
from qcli.utils.errors import UnsupportedError, UsageError
from qcli.utils.files import require_regular
from qcli.utils.trust import NOTHING, Trust

__all__ = ["PACKED_GGUF", "ModelSource", "open_packed", "open_source"]

PACKED_GGUF = "model.gguf"  # in a folder of `qcli pack`

_LAYOUTS = "qcli.models.layouts"
_HUB = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(/(?P<file>[^@]+\.gguf))?(@(?P<revision>[\w./-]+))?"
)
_PROJECTORS = "mmproj"  # what names of their files begin with
_SHOWN = 12  # files that a message names
_HUB_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_HUB_FILES = [
    *("*.json", "*.model*", "*.txt", "*.jinja", "*.tiktoken", "*.spm", "*.bpe", "*.vocab"),
    *("LICEN[CS]E*", "[Ll]icen[cs]e*", "NOTICE*", "Notice*", "COPYING*", "USE_POLICY*", "README.md"),
]
_HUB_CODE = ["*.py"]


def open_source(model: str, trust: Trust = NOTHING) -> ModelSource:
    """Open a model and check its files. No weight is read; for folders torch is not imported.

    Args:
        model: a folder, a `.gguf` file, or a model of the hub, from its cache or downloaded: `org/name`, a GGUF file in
            it, `org/name/file.gguf`, and either at a branch, tag or commit, `org/name@revision`.
        trust: whether transformers may run the model's own Python files.

    Raises:
        UsageError: no such model, or its files are missing, truncated, malformed or unsafe.
        UnsupportedError: qcli does not support this kind of model, or a package is missing.
    """
    path, hub = Path(model).expanduser(), None
    if not path.exists():
        path, hub = _download(model, trust)
    if path.is_dir() and not _has_weights(path) and (files := _models(file.name for file in path.glob("*.gguf"))):
        path = path / _only(files, model, "in the folder")
    source = _open(path, model, trust)
    source.hub = hub
    return source


def _open(path: Path, model: str, trust: Trust) -> ModelSource:
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"{model} is neither a folder nor a .gguf file", hint="give the model's folder")
        path = parts(path)[0]
        if _is_packed_gguf(path):
            return GGUFSource(path, beside=path.parent, trust_remote_code=trust.remote_code)
        if beside := tokenizer_files(path.parent):
            raise UsageError(
                f"{model} has a tokenizer, and beside it lies another: {min(beside)}, which transformers would take",
                hint="move the .gguf file into a folder of its own, or give the folder of the model it was made from",
            )
        return GGUFSource(path, trust_remote_code=trust.remote_code)
    for file in path.iterdir():  # transformers would wait for a FIFO forever
        require_regular(file)
    # Someone may have put a converted file beside another checkpoint; the manifest says which of them was packed.
    if _is_packed_gguf(path / PACKED_GGUF):
        return GGUFSource(path / PACKED_GGUF, beside=path, trust_remote_code=trust.remote_code)
    config = read_config(path)
    source = _source_class(path, quant_method(config), packed=(path / MANIFEST).exists())
    return source(path, config, trust_remote_code=trust.remote_code)


def open_packed(folder: Path, trust: Trust = NOTHING) -> ModelSource:
    """Open a folder that `qcli pack` has written, which has no manifest yet.

    Raises:
        UsageError: its files are missing, truncated or malformed.
        VerificationError: config and tensors disagree.
    """
    config = read_config(folder)
    return _source_class(folder, quant_method(config), packed=True)(folder, config, trust_remote_code=trust.remote_code)


def _is_packed_gguf(file: Path) -> bool:
    """Whether `qcli pack` wrote the file, with the model's own tokenizer beside it."""
    folder = file.parent
    there = file.name == PACKED_GGUF and file.exists() and (folder / MANIFEST).exists()
    return there and Manifest.read(folder).packed_as == "gguf"


def _source_class(path: Path, method: str | None, *, packed: bool) -> type[FolderSource]:
    """The class that reads a folder with this `quant_method`; other engines' layouts only if `qcli pack` wrote them."""
    if method is None:
        return FolderSource
    if method == "qcli":
        return NativeSource
    if packed and method in registry.names(_LAYOUTS):
        source: type[FolderSource] = registry.load(_LAYOUTS, method)
        return source
    if decoded.reads(method):
        return decoded.DecodedSource
    raise UnsupportedError(
        f"{path} is already quantized ({method}), which qcli does not read",
        hint=f"it reads {', '.join(decoded.encodings())}; or use the unquantized model",
    )


def _has_weights(folder: Path) -> bool:
    """Whether a folder is more than a place for GGUF files."""
    return any(folder.glob("*.safetensors")) or (folder / MANIFEST).exists()


def _models(files: Iterable[str]) -> list[str]:
    """The names of GGUF files that are models: of a split one the first, and no projectors of images."""
    named = (name for name in files if name.endswith(".gguf") and not Path(name).name.startswith(_PROJECTORS))
    return sorted(name for name in named if not is_later_part(Path(name)))


def _only(files: list[str], model: str, place: str) -> str:
    """The GGUF file of a model that has one.

    Raises:
        UsageError: it has several; the hint names them.
    """
    if len(files) > 1:
        more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
        raise UsageError(
            f"{model} has {len(files)} GGUF models",
            hint=f"give one of them, as in {model}/{files[0]}; {place}: {', '.join(files[:_SHOWN])}{more}",
        )
    return files[0]


def _download(model: str, trust: Trust) -> tuple[Path, HubModel]:
    """A model's folder or GGUF file in the hub's cache.

    Raises:
        UsageError: there is no such model, or the hub cannot be reached.
    """
    match = _HUB.fullmatch(model)
    local, at, revision = model.rpartition("@")
    if at and Path(local).expanduser().exists():
        raise UsageError(f"{local} is not a hub id, it has no revision {revision}", hint="leave the revision out")
    if match is None or (match["repository"].endswith(".gguf") and match["file"] is None):
        raise UsageError(f"{model} does not exist", hint="give a folder, a .gguf file, or a hub id such as org/name")
    repository, file, revision = match["repository"], match["file"], match["revision"]
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    def fetch(*patterns: str, at: str | None = revision, **further: Any) -> Path:
        return Path(snapshot_download(repository, revision=at, allow_patterns=list(patterns), **further))

    try:
        if file is None:
            folder = fetch(*_HUB_WEIGHTS, ignore_patterns=["*/*"])
            if not _has_weights(folder):  # a tokenizer beside a GGUF file would be another than the file's
                files = _models(HfApi().list_repo_files(repository, revision=folder.name))
                file = _only(files, model, "in the repository") if files else None
        if file is None:
            trusted = trust.remote_code
            fetch(*_HUB_FILES, *(_HUB_CODE if trusted else ()), at=folder.name, ignore_patterns=["*/*"])
            fetch(f"{CHAT_TEMPLATES}/*.jinja", *(["custom_generate/*"] if trusted else ()), at=folder.name)
            found = folder
        else:
            first, *_ = names = part_names(Path(file).name)
            folder = fetch(*(Path(file).with_name(name).as_posix() for name in names))
            found = folder / Path(file).with_name(first)
        if not found.exists():
            raise UsageError(f"{repository} on the hub has no file {file}", hint=f"give {repository} to see its files")
        return found, HubModel(repository, folder.name)
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            raise UsageError(
                f"{model} is not a local folder, HF_HUB_OFFLINE is set, and the hub's cache does not have it",
                hint="check the spelling, or unset HF_HUB_OFFLINE to download it",
            ) from None
        reason = "the hub cannot be reached and its cache does not have it"
    except RevisionNotFoundError:
        reason = f"{repository} on the hub has no revision {revision}"
    except RepositoryNotFoundError:
        reason = "it does not exist on the hub, or you have no access"
    except (OSError, ValueError) as error:
        reason = first_line(error)
    raise UsageError(
        f"{model} is not a local folder, and {reason}",
        hint="check the spelling, the network, and HF_TOKEN for gated models",
    )
