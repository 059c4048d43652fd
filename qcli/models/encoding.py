"""How other software stores quantized weights, as far as reading goes: what is needed to decode them.

A model that is quantized already is a source like any other, whose weights are decoded as they are read, one at a time,
to what that software computes with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from qcli.models.derived import Derived, SourceTensor
from qcli.utils.dtypes import DTYPES, WEIGHT_DTYPES, StoredTensor
from qcli.utils.errors import UnsupportedError, UsageError
from qcli.utils.safetensors import Extent, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

Decode = Callable[[dict[str, "Tensor"]], "Tensor"]
"""From the stored tensors of a weight, by their role, to its values in any float dtype; a ValueError says that they do
not fit together."""


@dataclass(frozen=True)
class Decoded(Derived):
    """A quantized weight, decoded when it is read.

    Attributes:
        name: what it is called in messages.
        parts: the stored tensors by their role.
        decode: computes the weight from them; of a stack, also of a single one.
        encoding: what the weight is stored as.
        stack: whether all parts are stacks.
    """

    name: str
    stored: StoredTensor
    parts: Mapping[str, Extent]
    decode: Decode
    encoding: str
    stack: bool = False

    @property
    def origins(self) -> tuple[Extent, ...]:
        return tuple(self.parts.values())

    @property
    def stored_as(self) -> str:
        return self.encoding

    def read(self) -> Tensor:
        try:
            weight = self.decode(read_tensors(self.parts.items())).to(self.stored.torch_dtype)
        except ValueError:
            raise _malformed(self.name, self.encoding) from None
        if weight.shape != self.stored.shape:
            raise _malformed(self.name, self.encoding)
        return weight.contiguous()

    def item(self, index: int) -> SourceTensor:
        if not self.stack:
            return super().item(index)
        parts = {role: part.item(index) for role, part in self.parts.items()}
        return replace(self, parts=parts, stored=StoredTensor(self.stored.dtype, self.stored.shape[1:]), stack=False)


class Encoding(ABC):
    """A `quantization_config` of other software.

    Args:
        config: the `quantization_config`.
        dtype: that the model runs in, by safetensors' name.

    Attributes:
        method: the `quant_method`.
        unused: ends of the names of tensors that only that software's own arithmetic needs: scales of activations and
            of the key and value cache.

    Raises:
        UnsupportedError: a variant that is not read.
        UsageError: the config is malformed.
    """

    method: ClassVar[str]
    unused: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Mapping[str, Any], dtype: str) -> None:
        self.config, self.dtype = config, dtype

    @property
    @abstractmethod
    def description(self) -> str:
        """What weights are stored as, in few words."""

    @abstractmethod
    def weights(self, stored: Mapping[str, Extent]) -> Iterator[tuple[str, Decoded, list[str]]]:
        """The quantized weights: name that the decoded one has on disk, the weight, names of the tensors it replaces.

        Raises:
            UsageError: tensors are missing or do not fit together.
            UnsupportedError: a variant that is not read.
        """

    def decoded(self, stored: Mapping[str, Extent]) -> dict[str, SourceTensor]:
        """Tensors by name on disk, with a weight in place of the tensors that it is stored in.

        Raises:
            UsageError: as `weights`; also if a weight remains that is of no float type.
        """
        weights: dict[str, Decoded] = {}
        home: dict[str, str] = {}
        for name, weight, replaced in self.weights(stored):
            weights[name] = weight
            home |= dict.fromkeys(replaced, name)
        if not weights:
            raise UsageError(
                f"config.json says that weights are stored as {self.method}, and none of them is",
                hint="if they are dense, remove its quantization_config",
            )
        tensors: dict[str, SourceTensor] = {}
        for name, extent in stored.items():
            if name in home:
                tensors.setdefault(home[name], weights[home[name]])
            elif not name.endswith(self.unused or "\0"):
                if name.endswith(".weight") and extent.stored.dtype not in WEIGHT_DTYPES:
                    raise UsageError(
                        f"{extent.file}: {name} is {extent.stored.dtype}, without the scales of {self.method}",
                        hint="download the model again",
                    )
                tensors[name] = extent
        return tensors

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        parts: Mapping[str, Extent],
        decode: Decode,
        *,
        dtype: str | None = None,
        stack: bool = False,
    ) -> Decoded:
        """A weight of this encoding.

        Args:
            dtype: that it is read in, by safetensors' name; None: that of the model.
        """
        return Decoded(name, StoredTensor(dtype or self.dtype, shape), parts, decode, self.description, stack)

    def malformed(self, name: str) -> UsageError:
        """The error for tensors that do not fit together."""
        return _malformed(name, self.description)

    def unread(self, what: str, read: str) -> UnsupportedError:
        """The error for a variant that is not read.

        Args:
            what: the variant.
            read: those that are.
        """
        return UnsupportedError(
            f"the model is already quantized as {self.method} with {what}, which qcli does not read",
            hint=f"it reads {read}; or use the unquantized model",
        )


def part(stored: Mapping[str, Extent], name: str) -> Extent:
    """A stored tensor that a weight needs.

    Raises:
        UsageError: it is missing.
    """
    if name not in stored:
        raise UsageError(f"the checkpoint has no tensor {name}", hint="download the model again")
    return stored[name]


def float_dtype(extent: Extent, otherwise: str) -> str:
    """The dtype of a tensor of scales, if weights can have it."""
    dtype = extent.stored.dtype
    return dtype if dtype in WEIGHT_DTYPES and DTYPES[dtype].bytes == 2 else otherwise


def _malformed(name: str, encoding: str) -> UsageError:
    return UsageError(f"the tensors of {name} do not fit together as {encoding}", hint="download the model again")
