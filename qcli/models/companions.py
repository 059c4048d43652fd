"""Files that go with a model's weights: tokenizer, chat templates, generation and processor configs, licences.

They are copied into checkpoints, which are made to be uploaded, from folders that may come from anyone. So only files
of known names are copied, which lie in the model's own folder or, as links, in the hub cache that it is part of.
Python code stays behind, and so do the entries that name it, unless the user trusts it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath
from typing import Any

from qcli.utils.errors import UsageError
from qcli.utils.files import copy_file, parse_json, write_bytes

CHAT_TEMPLATES = "additional_chat_templates"
_TOKENIZER_FILES = (
    *("tokenizer*.json", "tokenizer*.model", "tokenizer*.model.v*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "encoder.json", "merges.txt", "bpe.codes", "tekken.json"),
    *("*.model", "*.spm", "*.tiktoken", "*.vocab"),
)
_NAMES = (
    *_TOKENIZER_FILES,
    *("generation_config.json", "chat_template.jinja", "chat_template.json", "params.json"),
    *("preprocessor_config.json", "processor_config.json", "*_preprocessor_config.json", "*_processor_config.json"),
    *("image_processor*.json", "feature_extractor*.json", "audio_tokenizer_config.json"),
)
_LEGAL = ("*licen[cs]e*", "*notice*", "copying*", "*use_policy*", "*terms_of_use*")  # in any case
_VOCABULARY_KINDS = (".json", ".txt", ".model", ".tiktoken", ".vocab", ".bpe", ".spm")
_LEGAL_KINDS = ("", ".txt", ".md", ".rst", ".html", ".pdf")
_DATA = ("tokenizer.json", "vocab.json", "encoder.json", "tekken.json")  # large, and nothing in them names code
_MAX_BYTES = 256 << 20  # vocabularies of several hundred thousand tokens take some 40 MB
_CODE_ENTRIES = ("auto_map", "custom_pipelines")
_ORIGINS = ("_name_or_path", "name_or_path")
_REFERENCE = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*")  # module.Class; of another repository: org/name--module.Class


def companions(folder: Path, *, trusted: bool) -> dict[str, Path | bytes]:
    """What goes with the weights of a model's folder, by name: a file to copy, or the content of one that is changed.

    Args:
        trusted: whether the model's Python files are trusted, and go along with the files that they name; else no
            config names them.

    Raises:
        UsageError: a file of a known name leads out of the folder, is none that can be read to an end, is larger
            than any of its kind, or is a config and no JSON; or as `code_files`.
    """
    files: dict[str, Path | bytes] = {**_companion_files(folder)}
    if trusted:
        code = code_files(folder)
        files |= code | _named_files(folder, code.values())
    for name, file in files.items():
        if isinstance(file, Path) and name.endswith(".json") and name not in _DATA:
            files[name] = _config(file, trusted=trusted)
    return files


def write_companions(files: Mapping[str, Path | bytes], out: Path) -> None:
    """Write what `companions` gave into the folder `out`."""
    for name, content in files.items():
        (out / name).parent.mkdir(exist_ok=True)
        if isinstance(content, Path):
            copy_file(content, out / name)
        else:
            write_bytes(out / name, content)


def without_code(config: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
    """A config as a checkpoint holds it: no entries that name code which is not copied, no folder of this machine."""
    kept = {key: value for key, value in config.items() if key not in _ORIGINS or not _is_absolute(value)}
    return kept if trusted else _without_code(kept)


def code_files(folder: Path) -> dict[str, Path]:
    """The Python files of a model that transformers may run, by name: those that its configs name, and their imports.

    Raises:
        UsageError: a config names what is no module of the folder, or a file that leads out of it.
    """
    configs = {"config.json": folder / "config.json", **_companion_files(folder)}
    modules = [module for name, file in configs.items() for module in _modules(name, file)]
    files: dict[str, Path] = {}
    while modules:
        name = f"{modules.pop()}.py"
        if name in files:
            continue
        if not (folder / name).exists() or (real := _real(folder, folder / name)) is None:
            raise UsageError(f"{folder} has no {name}, which its configs name", hint="download the model again")
        files[name] = real
        modules += _imports(real)
    for file in sorted(folder.glob("custom_generate/*.py")):  # which no config names
        if (real := _real(folder, file)) is not None:
            files[f"custom_generate/{file.name}"] = real
    return files


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The companions that make a model's tokenizer.

    Raises:
        UsageError: as `companions`.
    """
    files = _companion_files(folder)
    return {name: file for name, file in files.items() if any(fnmatchcase(name, each) for each in _TOKENIZER_FILES)}


def _companion_files(folder: Path) -> dict[str, Path]:
    files = [file for file in sorted(folder.iterdir()) if _is_known(file.name)]
    templates = folder / CHAT_TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        names = sorted(file.name for file in templates.iterdir() if file.suffix == ".jinja")
        files += [templates / name for name in names if name.isprintable()]
    real = ((file.relative_to(folder).as_posix(), _real(folder, file)) for file in files)
    return {name: file for name, file in real if file is not None}


def _is_known(name: str) -> bool:
    if not name.isprintable():
        return False
    if any(fnmatchcase(name, pattern) for pattern in _NAMES):
        return True
    return Path(name).suffix.lower() in _LEGAL_KINDS and any(fnmatchcase(name.lower(), legal) for legal in _LEGAL)


def _real(folder: Path, file: Path) -> Path | None:
    """The file itself, links followed; None: it is a folder.

    Raises:
        UsageError: as `companions`.
    """
    try:
        real = file.resolve(strict=True)
    except (OSError, RuntimeError):  # a link to nothing, or to itself
        raise UsageError(f"{file} is a link that leads nowhere", hint="download the model again") from None
    if real.is_dir():
        return None
    if not any(real.is_relative_to(home) for home in _homes(folder)):
        raise UsageError(
            f"{file} is a link out of the model's folder, to {real}", hint="put the file itself into the folder"
        )
    if not real.is_file():
        raise UsageError(f"{file} is no regular file", hint="put the file itself into the folder")
    if (size := real.stat().st_size) > _MAX_BYTES:
        raise UsageError(f"{file} has {size} bytes, more than any file of its kind", hint="is it what its name says?")
    return real


def _homes(folder: Path) -> list[Path]:
    """Where files of the model may lie: its folder and, if that is a snapshot in a hub cache, the cache's blobs."""
    home = folder.resolve()
    return [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]


def _config(file: Path, *, trusted: bool) -> Path | bytes:
    """A config as it goes along: the file itself where nothing has to be left out."""
    try:
        config = parse_json(file.read_bytes())
    except ValueError as error:
        raise UsageError(f"{file} is not valid JSON: {error}", hint="download the model again") from None
    kept = without_code(config, trusted=trusted) if isinstance(config, dict) else config
    return file if kept == config else (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def _without_code(value: Any) -> Any:
    """`value` without entries that name code, at any depth: a processor's config has those of its parts."""
    if not isinstance(value, dict):
        return value
    return {key: _without_code(item) for key, item in value.items() if key not in _CODE_ENTRIES}


def _is_absolute(value: Any) -> bool:
    """Whether a name is a path on the machine where the model was saved."""
    return isinstance(value, str) and (value.startswith(("/", "~")) or PureWindowsPath(value).is_absolute())


def _modules(name: str, file: Path) -> Iterator[str]:
    """Modules of the model's folder that one of its configs names."""
    if name in _DATA or not name.endswith(".json"):
        return
    try:
        config = parse_json(file.read_bytes())
    except ValueError:
        return  # reported by what reads it
    for text in _references(config):
        if "--" in text:
            continue
        if not _REFERENCE.fullmatch(text):
            raise UsageError(f"{file} names {text!r} as code, which is no class of a module beside it")
        yield text.partition(".")[0]


def _references(value: Any, entry: bool = False) -> Iterator[str]:
    """All strings under the entries that name code: `module.Class`."""
    if isinstance(value, str) and entry:
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _references(item, entry or key in ("auto_map", "impl"))
    elif isinstance(value, list) and entry:
        for item in value:
            yield from _references(item, entry)


def _imports(file: Path) -> list[str]:
    """Modules of the same folder that a Python file imports (`from .module import name`)."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        raise UsageError(f"{file} is not valid Python", hint="download the model again") from None
    relative = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1)
    return [node.module for node in relative if node.module]


def _named_files(folder: Path, code: Iterable[Path]) -> dict[str, Path]:
    """Files that the model's code names: vocabularies of names that only its tokenizer knows."""
    nodes = (node for file in code for node in ast.walk(ast.parse(file.read_bytes())))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    known = {file.name: file for file in folder.iterdir() if file.suffix in _VOCABULARY_KINDS and file.name in texts}
    real = ((name, _real(folder, file)) for name, file in known.items() if name != "config.json")
    return {name: file for name, file in real if file is not None}
