"""How much each input of a layer matters, from the statistics that `qcli calibrate` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.data.calibration_folder import read_record
from qcli.models.source import ModelSource
from qcli.utils.errors import UsageError
from qcli.utils.safetensors import read_header, read_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_FILE = "statistics.safetensors"


class Importance:
    """Mean squares of every layer's inputs.

    Args:
        folder: of `qcli calibrate`, on the same model.

    Attributes:
        record: the content of its `calibration.json`.

    Raises:
        UsageError: it is no such folder, of another model, or without statistics of some of its layers.
    """

    def __init__(self, folder: Path, source: ModelSource) -> None:
        self.record: dict[str, Any] = read_record(folder)
        if not self.record or not (folder / _FILE).is_file():
            raise UsageError(
                f"--statistics: {folder} is not a folder written by `qcli calibrate`",
                hint="run `qcli calibrate` on the model",
            )
        if self.record.get("source_fingerprint") != source.fingerprint():
            raise UsageError(
                f"--statistics: {folder} is of another model, {self.record.get('model')}",
                hint="run `qcli calibrate` on this model",
            )
        ending = ".second_moment"
        header = {name: extent for name, extent in read_header(folder / _FILE).items() if name.endswith(ending)}
        self._moments = {name.removesuffix(ending): moment for name, moment in read_tensors(header.items()).items()}
        if missing := [linear.name for linear in source.linears() if linear.name not in self._moments]:
            raise UsageError(
                f"--statistics: {folder} has none of {missing[0]}, nor of {len(missing) - 1} more layers",
                hint="run `qcli calibrate` on this model",
            )

    def of_tensors(self, named: Mapping[str, Sequence[str]]) -> dict[str, NDArray[Any]]:
        """float32 `[in]` by name of the tensor in the file; of experts `[experts * in]`.

        Args:
            named: names of the file's tensors, each with the tensors of the dense model that it stands for.
        """
        import torch

        moments = {}
        for name, originals in named.items():
            layers = [original.removesuffix(".weight") for original in originals]
            if all(layer in self._moments for layer in layers):
                moments[name] = torch.cat([_told(self._moments[layer]) for layer in layers]).numpy()
        return moments


def _told(moment: Tensor) -> Tensor:
    """The moment; ones where no token came by, as at an expert that calibration did not reach."""
    return moment if bool(moment.any()) else moment.new_ones(moment.shape)
