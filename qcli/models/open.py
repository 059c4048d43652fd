"""Where a model comes from: a folder, a hub id, or a GGUF file."""

from __future__ import annotations

import re
from pathlib import Path

from qcli.models.folder import FolderSource, quant_method, read_config
from qcli.models.gguf import GGUFSource
from qcli.models.manifest import MANIFEST, Manifest
from qcli.models.native import NativeSource
from qcli.models.source import ModelSource, first_line
from qcli.utils import registry
from qcli.utils.errors import UnsupportedError, UsageError

__all__ = ["PACKED_GGUF", "ModelSource", "open_packed", "open_source"]

PACKED_GGUF = "model.gguf"  # in a folder of `qcli pack`

_LAYOUTS = "qcli.models.layouts"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def open_source(model: str, *, trust_remote_code: bool = False) -> ModelSource:
    """Open a model and check its files; no weight is read, and for folders torch is not imported.

    Args:
        model: a folder, a `.gguf` file, or the id of a model on the hub (downloaded, or found in its cache).
        trust_remote_code: let the model's own Python files run where transformers asks for them.

    Raises:
        UsageError: no such model, or its files are missing, truncated, malformed or unsafe.
        UnsupportedError: the model is of a kind that qcli does not handle, or a package is missing.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"{model} is a file", hint="give the model's folder, or a .gguf file")
        return GGUFSource(path, trust_remote_code=trust_remote_code)
    if not path.is_dir():
        path = _download(model)
    # A converted file may also lie beside a checkpoint of another layout: the manifest says which of them was packed.
    if (path / PACKED_GGUF).exists() and (path / MANIFEST).exists() and Manifest.read(path).packed_as == "gguf":
        return GGUFSource(path / PACKED_GGUF, beside=path, trust_remote_code=trust_remote_code)
    config = read_config(path)
    source = _source_class(path, quant_method(config), packed=(path / MANIFEST).exists())
    return source(path, config, trust_remote_code=trust_remote_code)


def open_packed(folder: Path) -> ModelSource:
    """Open a folder that `qcli pack` has written, but has not given its manifest yet.

    Raises:
        UsageError: its files are missing, truncated or malformed.
        VerificationError: config and tensors disagree.
    """
    config = read_config(folder)
    return _source_class(folder, quant_method(config), packed=True)(folder, config)


def _source_class(path: Path, method: str | None, *, packed: bool) -> type[FolderSource]:
    """What reads a folder, by its `quant_method`: a layout of that name, but only where `qcli pack` wrote it."""
    if method is None:
        return FolderSource
    if method == "qcli":
        return NativeSource
    if packed and method in registry.names(_LAYOUTS):
        source: type[FolderSource] = registry.load(_LAYOUTS, method)
        return source
    raise UnsupportedError(f"{path} is already quantized ({method})", hint="start from the unquantized model")


def _download(model: str) -> Path:
    if not _HUB_ID.fullmatch(model) or model.endswith(".gguf"):
        raise UsageError(f"{model} does not exist", hint="give a folder, a .gguf file, or a hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached and its cache does not hold it"
    except RepositoryNotFoundError:
        reason = "the hub does not have it, or not for you"
    except (OSError, ValueError) as error:
        reason = first_line(error)
    raise UsageError(
        f"{model} is no folder here, and {reason}",
        hint="check the spelling, the network, and HF_TOKEN if gated",
    )
