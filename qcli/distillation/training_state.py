"""The state of a training in its run folder, so that it can be resumed exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from qcli.utils.distributed import Processes
from qcli.utils.files import files_below, sha256
from qcli.utils.run_folder import RunFolder

STATE_VERSION = 3  # part of a run's identity; 1: a parameter for each layer; 2: one for a block's, whatever their size
_PARTS = ("state-0", "state-1")
_FILES = "files"


class TrainingState:
    """Two parts of a run, written in turn, so that at least one is complete at any moment (a `Checkpointer`).

    Args:
        run: the run folder, open in the main process alone.
        folder: its path, which all processes see.
    """

    def __init__(self, run: RunFolder | None, folder: Path, processes: Processes) -> None:
        self.run, self.folder, self.processes = run, folder, processes

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        newest = self.processes.broadcast(self._newest)
        if newest is None:
            return None
        part, state = newest
        state.pop(_FILES, None)
        if self.processes.world_size > 1:
            self.processes.load(tensors, self.folder / part)
        else:
            assert self.run is not None
            for name, value in load_file(self.run.file(part)).items():
                tensors[name].copy_(value)
        return state

    def save(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        part = _PARTS[(len(state["curve"]) - 1) % 2]
        if self.processes.world_size == 1:
            assert self.run is not None
            self.run.commit(part, {name: tensor.cpu() for name, tensor in tensors.items()}, state)
            return
        self.processes.save(tensors, self.folder / part)
        if self.run is not None:
            self.run.commit(part, {}, state | {_FILES: _hashes(self.folder / part)})

    def _newest(self) -> tuple[str, dict[str, Any]] | None:
        run = self.run
        assert run is not None
        complete = [part for part in _PARTS if run.done(part) is not None and self._is_complete(part)]
        newest = max(complete, key=lambda part: int(run.report(part)["steps"]), default=None)
        return None if newest is None else (newest, {**run.report(newest)})

    def _is_complete(self, part: str) -> bool:
        """Whether the shards that several processes wrote are still intact."""
        assert self.run is not None
        return self.processes.world_size == 1 or _hashes(self.folder / part) == self.run.report(part)[_FILES]


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in files_below(folder)} if folder.is_dir() else {}
