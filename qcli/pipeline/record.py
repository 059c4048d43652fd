"""The record of a run folder: its stages, what each result was made from, and the text that stands for `auto`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcli.data.default_text import AUTO, ON_HUB, WITHOUT_HUB
from qcli.models.manifest import MANIFEST, Manifest, require_own_checkpoint
from qcli.utils import sealed
from qcli.utils.errors import StateError, UsageError
from qcli.utils.files import parse_json, reading, sha256, write_bytes, writing
from qcli.utils.run_folder import differences

QUANTIZED, DISTILLED, EVALUATION, PACKED = "quantized", "distilled", "eval.json", "packed"
RECORD = "stages.json"


class StageRecord:
    """The stages of a run folder, and what each result was made from.

    A stage is recorded before it starts. Results appear complete or not at all, so a result that is there, with
    a record of the same inputs, is done. The hash of a result that is a file is recorded before it is written. Of a
    result that is going to be replaced, and of those of later stages, the hash is recorded until they are: as long as
    they are there, the new ones are not. The text that stands for `auto` is recorded with the first stage that begins
    after it was chosen, so that all stages and all later calls read the same.

    Args:
        force: whether results that were made with other settings are replaced.

    Raises:
        StateError: the folder is a dangling symbolic link, or its record is damaged.
        UsageError: it is not a folder.
    """

    def __init__(self, folder: Path, force: bool = False) -> None:
        self.folder, self.force = folder, force
        if folder.is_symlink() and not folder.exists():
            raise StateError(f"{folder} is a dangling symbolic link", hint="choose another --out, or remove it")
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is not a folder", hint="choose another --out")
        self.stages: dict[str, Any] = {}  # inputs by result, in the order in which stages began
        self.hashes: dict[str, str] = {}  # of files by name, of what is replaced by `_replaced(name)`
        self.text: str | None = None  # what stands for `auto`; None: not chosen yet
        if (folder / RECORD).exists():
            try:
                self.stages, self.hashes, *more = sealed.load_json(folder / RECORD)
            except sealed.Damaged as problem:
                raise StateError(str(problem), hint="choose another --out") from None
            self.text = more[0] if more else None  # earlier versions recorded none

    def write(self, name: str, content: bytes) -> None:
        """Write a result that is a file.

        Raises:
            QcliError: it cannot be written; see `os_problem`.
        """
        self.hashes[name] = hashlib.sha256(content).hexdigest()
        self._save()
        write_bytes(self.folder / name, content)
        self.finish(name)

    def finish(self, name: str) -> None:
        """Note that the new result is there, which may be equal to the one that it replaces."""
        if self.hashes.pop(_replaced(name), None) is not None:
            self._save()

    def read(self, name: str) -> bytes:
        """A result that is a file.

        Raises:
            StateError: it was damaged or edited.
            QcliError: it cannot be read; see `os_problem`.
        """
        file = self.folder / name
        with reading(file):
            content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.hashes.get(name):
            raise _edited(file)
        return content

    def done(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether result `name` exists; if not, or if it is to be replaced, its inputs are recorded.

        Raises:
            StateError: it exists and was made from other inputs (the differences are named).
        """
        result = self.folder / name
        if result.exists():
            if not self.replaces(name, inputs):
                return True
            for stale in self._made_of(name):
                if (file := self._identified_by(stale)).is_file():
                    self.hashes[_replaced(stale)] = sha256(file)
        self.stages[name] = inputs
        self._save()
        return False

    def replaces(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether an existing result was made from other inputs, and is to be replaced.

        Raises:
            StateError: it was, and nobody asked to replace it; or no run made it.
        """
        result, file = self.folder / name, self._identified_by(name)
        described = differences(self.stages.get(name), inputs)
        if _replaced(name) in self.hashes and file.is_file() and sha256(file) == self.hashes[_replaced(name)]:
            described = described or "a run that was interrupted was replacing it"
        if not described:
            return False
        problem = f"{result} was made with other settings: {described}"
        if name not in self.stages:
            raise StateError(problem, hint=f"choose another --out, or move {result} away")
        if not self.force:
            made = [str(self.folder / other) for other in self._made_of(name)]
            ways = f"choose another --out, remove {', '.join(made)}, or replace {'them' if made[1:] else 'it'}: --force"
            raise StateError(problem, hint=ways)
        return True

    def require_own(self, name: str) -> None:
        """Refuse to replace a result that is not as it was written.

        Raises:
            StateError: it is a file that has changed.
            QcliError: as `require_own_checkpoint`.
        """
        file = self.folder / name
        if name != EVALUATION:
            require_own_checkpoint(file)
        elif sha256(file) not in (self.hashes.get(name), self.hashes.get(_replaced(name))):
            raise _edited(file)

    def text_before(self) -> str | None:
        """What stood for `auto` where the record does not say so, as that of an earlier version: the results do.

        Raises:
            StateError: it was not the same for all of them.
            QcliError: a result is damaged.
        """
        made = {name: inputs for name, inputs in self.stages.items() if (self.folder / name).exists()}
        texts = set[str | None]()
        if (quantized := made.get(QUANTIZED)) and quantized["recipe"]["calibration"]["data"] == AUTO:
            texts.add(Manifest.read(self.folder / QUANTIZED).calibration_text_identity)
        if distilled := made.get(DISTILLED):
            data = distilled["distill"]["data"] or distilled["recipe"]["calibration"]["data"]
            if data == AUTO:
                texts.add(Manifest.read(self.folder / DISTILLED).distilled[-1].text_identity)
        if (evaluated := made.get(EVALUATION)) and AUTO in (known := evaluated["eval"]["perplexity"]):
            texts |= {text for text in parse_json(self.read(EVALUATION))["perplexity"] if text not in known}
        texts &= {ON_HUB, WITHOUT_HUB}
        if texts == {ON_HUB, WITHOUT_HUB}:
            raise StateError(
                f"one result in {self.folder} was made with {ON_HUB}, another with {WITHOUT_HUB}, as {AUTO} allowed",
                hint="choose another --out",
            )
        return next(iter(texts), None)

    def _identified_by(self, name: str) -> Path:
        """A result that is a file, or the manifest of one that is a folder."""
        return self.folder / name if name == EVALUATION else self.folder / name / MANIFEST

    def _save(self) -> None:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        sealed.write_json(self.folder / RECORD, [self.stages, self.hashes, self.text])

    def _made_of(self, name: str) -> list[str]:
        """This result and those of later stages, as far as they exist."""
        return [name, *(other for other in self._after(name) if (self.folder / other).exists())]

    def _after(self, name: str) -> list[str]:
        names = [*self.stages]
        return names[names.index(name) + 1 :] if name in names else []


def _edited(file: Path) -> StateError:
    return StateError(f"{file} was damaged or edited: its checksum does not match", hint=f"remove {file}")


def _replaced(name: str) -> str:
    """The key of the hash of a result that is going to be replaced."""
    return f"{name}, replaced"
