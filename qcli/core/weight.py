"""QuantizedWeight, the one noun of qcli, and Format, what its codes mean: the base class of `formats/`.

A format is a small frozen record (`bits`, `group_size`, ...) that is written as it is into the checkpoint's
`config.json`. This module and the formats import no torch, so that recipes and `--dry-run` stay fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qcli.utils import registry
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import VerificationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Rounder: TypeAlias = "Callable[[int, Tensor], tuple[Tensor, Tensor]]"
"""(column, float values `[out]`) -> (codes as floats `[out]`, nearest representable values `[out]`)."""

_INSIDE = 0.49  # of a step: how near to a code's boundary a latent may start


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer codes and the small tables that give them meaning.

    Attributes:
        format: what codes and tables mean.
        shape: `(out_features, in_features)`.
        codes: uint8 `[out_features, in_features]`, each below `2**format.bits`.
        tables: scales, zero points, codebooks, ... in the dtype they are stored in.
    """

    format: Format
    shape: tuple[int, int]
    codes: Tensor
    tables: Mapping[str, Tensor]

    def dense(self) -> Tensor:
        """The float32 weight `[out_features, in_features]` that the codes stand for."""
        return self.format.decode(self.codes, self.tables)

    def check(self) -> None:
        """Raise VerificationError unless this is a valid weight of its format."""
        self.format.check(self)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        tables = {name: table.to(device) for name, table in self.tables.items()}
        return QuantizedWeight(self.format, self.shape, self.codes.to(device), tables)


class Format(BaseModel):
    """How the codes and tables of one linear layer stand for its weight.

    Subclasses give the meaning (`encode`, `decode`) and the layout (`stored`, `to_stored`, `from_stored`).
    Shapes are `(out_features, in_features)`; tables keep the dtype they are stored in, arithmetic is float32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str]

    bits: int = Field(ge=1, le=8)

    @property
    def normed(self) -> bool:
        """Whether a LayerNorm without parameters follows the layer, so that it is more than its weight and bias."""
        return False

    def attach(self, module: nn.Module) -> None:
        """Make a module that computes `x W_hat^T + bias` a layer of this format; survives copying and pickling."""
        if self.normed:
            module.register_forward_hook(_normalize)

    def stored(self, shape: tuple[int, int]) -> dict[str, StoredTensor]:
        """Tensors on disk by suffix (`weight_packed`, ...) for a weight of `shape`."""
        raise NotImplementedError

    def to_stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that `stored` announces, bit-packed."""
        raise NotImplementedError

    def from_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        """Inverse of `to_stored`."""
        raise NotImplementedError

    def encode(self, weight: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """Nearest codes: float `[out, in]` -> uint8 `[out, in]`."""
        raise NotImplementedError

    def decode(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """float32 `[out, in]`; differentiable in floating-point tables."""
        raise NotImplementedError

    def relaxed(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tables as numbers that training can move: float32, and `decode` gives the same. Integers that have
        no scale stay what they are."""
        return {name: table.float() if table.is_floating_point() else table for name, table in tables.items()}

    def restored(self, relaxed: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `relaxed`: the nearest tables that can be stored, for every name in `given`.

        Entries of floating-point tables that would become 0 or infinite keep those of `given`.
        """
        tables = dict(given)
        for name, table in given.items():
            if table.is_floating_point():
                nearest = relaxed[name].to(table.dtype)
                tables[name] = nearest.where(nearest.isfinite() & ((nearest != 0) | (table == 0)), table)
        return tables

    def units(self, relaxed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For every table that training moves, what a change of 1 means to each entry, so that one learning rate
        fits all; in shapes that broadcast to the table's. Here: an entry's own size, or a tenth of the mean's."""
        sizes = {name: table.abs() for name, table in relaxed.items() if table.is_floating_point()}
        return {name: size.clamp(min=0.1 * float(size.mean())) for name, size in sizes.items()}

    def steps(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """How far the nearest other value is that each weight could take: float32 `[out, in]`. Here: of codes in order,
        evenly spaced."""
        return (self.decode(codes ^ 1, tables) - self.decode(codes, tables)).abs()

    def latents(self, target: Tensor, value: Tensor, step: Tensor) -> Tensor:
        """Where training starts the latent weights behind codes that stand for `value`, `step` apart: float32 `[out,
        in]`. Here: as near to `target` as the codes allow."""
        return value + (target - value).clamp(-_INSIDE * step, _INSIDE * step)

    def slope(self, latent: Tensor, value: Tensor, step: Tensor) -> Tensor:
        """The share of each value's gradient that reaches its latent weight: `[out, in]`. Here: all of it where the
        latent is within a step of the value, none elsewhere."""
        return (latent - value).abs_() <= step

    def tile(self, tables: Mapping[str, Tensor], rows: slice) -> Mapping[str, Tensor]:
        """The tables that decode these rows of the codes alone; views. Here: every table has a row for each."""
        return {name: table[rows] for name, table in tables.items()}

    def columns(self, tables: Mapping[str, Tensor], columns: slice) -> Mapping[str, Tensor]:
        """The relaxed tables that decode these columns of the codes alone; they start with a group and end with one."""
        raise NotImplementedError

    def rounder(self, tables: Mapping[str, Tensor], columns: Tensor) -> Rounder:
        """Nearest values for one column at a time, for error feedback.

        Args:
            tables: of the whole weight.
            columns: int64 `[n]`, the column of the weight that each of the rounder's columns 0..n-1 is.
        """
        raise NotImplementedError

    def check(self, weight: QuantizedWeight) -> None:
        """Raise VerificationError unless shapes, dtypes and values are those this format allows."""
        raise NotImplementedError

    def facts(self, weight: QuantizedWeight) -> dict[str, float]:
        """What else is worth knowing of a weight of this format, by name."""
        return {}

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Bits of everything stored for this layer, divided by its number of weights."""
        return 8 * sum(tensor.bytes for tensor in self.stored(shape).values()) / prod(shape)

    def spec(self) -> dict[str, Any]:
        """What `from_spec` reads: the format's name and its fields."""
        return {"format": self.name, **self.model_dump()}


def _normalize(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
    """OneBit's LayerNorm (arXiv 2402.11295) of each token's outputs, with torch's epsilon; in float32."""
    from torch.nn import functional as F

    return F.layer_norm(output.float(), output.shape[-1:]).to(output.dtype)


def from_spec(spec: Mapping[str, Any]) -> Format:
    """The format that `Format.spec` described.

    Raises:
        VerificationError: unknown format, missing, unknown or invalid field.
    """
    fields = dict(spec)
    name = str(fields.pop("format", None))
    if name not in registry.names("qcli.core.formats"):
        raise VerificationError(
            f"unknown weight format {name!r} in the checkpoint's quantization_config",
            hint="it was written by a newer qcli, or the file was edited",
        )
    cls: type[Format] = registry.load("qcli.core.formats", name)
    try:
        return cls(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise VerificationError(f"bad {name} format in quantization_config: {place}: {first['msg']}") from None
