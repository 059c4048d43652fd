"""Open a model by its folder, hub id, or GGUF file."""

from __future__ import annotations

import re
from pathlib import Path

from qcli.models import decoded
from qcli.models.companions import CHAT_TEMPLATES, tokenizer_files
from qcli.models.folder import FolderSource, quant_method, read_config
from qcli.models.gguf import GGUFSource, parts
from qcli.models.manifest import MANIFEST, Manifest
from qcli.models.native import NativeSource
from qcli.models.source import ModelSource, first_line
from qcli.utils import registry
from qcli.utils.errors import UnsupportedError, UsageError
from qcli.utils.files import require_regular
from qcli.utils.trust import NOTHING, Trust

__all__ = ["PACKED_GGUF", "ModelSource", "open_packed", "open_source"]

PACKED_GGUF = "model.gguf"  # in a folder of `qcli pack`

_LAYOUTS = "qcli.models.layouts"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = [
    *("*.safetensors", "*.json", "*.model*", "*.txt", "*.jinja", "*.tiktoken", "*.spm", "*.bpe", "*.vocab"),
    *("LICEN[CS]E*", "[Ll]icen[cs]e*", "NOTICE*", "Notice*", "COPYING*", "USE_POLICY*"),
]
_HUB_CODE = ["*.py"]


def open_source(model: str, trust: Trust = NOTHING) -> ModelSource:
    """Open a model and check its files. No weight is read; for folders torch is not imported.

    Args:
        model: a folder, a `.gguf` file, or a hub id (from the hub's cache, or downloaded).
        trust: whether transformers may run the model's own Python files.

    Raises:
        UsageError: no such model, or its files are missing, truncated, malformed or unsafe.
        UnsupportedError: qcli does not support this kind of model, or a package is missing.
    """
    path = Path(model).expanduser()
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
    if not path.is_dir():
        path = _download(model, trust)
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


def _download(model: str, trust: Trust) -> Path:
    if not _HUB_ID.fullmatch(model) or model.endswith(".gguf"):
        raise UsageError(f"{model} does not exist", hint="give a folder, a .gguf file, or a hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        patterns = [*_HUB_FILES, *(_HUB_CODE if trust.remote_code else ())]
        folder = Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*/*"]))
        further = [f"{CHAT_TEMPLATES}/*.jinja", *(["custom_generate/*"] if trust.remote_code else ())]
        snapshot_download(model, revision=folder.name, allow_patterns=further)
        return folder
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached and its cache does not have it"
    except RepositoryNotFoundError:
        reason = "it does not exist on the hub, or you have no access"
    except (OSError, ValueError) as error:
        reason = first_line(error)
    raise UsageError(
        f"{model} is not a local folder, and {reason}",
        hint="check the spelling, the network, and HF_TOKEN for gated models",
    )
