"""QuantizedWeight, integer codes and their tables, and Format, what they mean: the base class of `formats/`.

A format is a small frozen record (`bits`, `group_size`, ...) that the checkpoint's `config.json` stores as it is. This
module and the formats import no torch at the top, so that recipes stay fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qcli.utils import registry
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import VerificationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Rule = Literal["grid", "signs", "table"]
LARGEST_SCALE = 65504.0  # the largest float16
_MAX_OFFSET = 0.49  # of a latent from its value, in quantization steps: 0.5 is the boundary to the next code
_SMALLEST_UNIT = 1e-30  # of a latent whose value has another entry of its codebook as an equal: it cannot move


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized linear layer: integer codes, and the small tables that give them meaning.

    Attributes:
        format: how codes and tables decode to a weight.
        shape: `(out_features, in_features)`.
        codes: uint8 `[out_features, in_features]`, each below `2**format.bits`.
        tables: scales, zero points, codebooks, ... in the dtype they are stored in.
    """

    format: Format
    shape: tuple[int, int]
    codes: Tensor
    tables: Mapping[str, Tensor]

    def dense(self) -> Tensor:
        """The decoded weight, float32 `[out_features, in_features]`."""
        return self.format.decode(self.codes, self.tables)

    def check(self) -> None:
        """Raise VerificationError unless this is a valid weight of its format."""
        self.format.check(self)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        tables = {name: table.to(device) for name, table in self.tables.items()}
        return QuantizedWeight(self.format, self.shape, self.codes.to(device), tables)


@dataclass(frozen=True)
class Rounder:
    """Rounds the columns of a weight one at a time, as error feedback (GPTQ) does, in as few operations as it can.

    Attributes:
        error: (values `[out]` with their shift, result `[out]`, operands of the column) writes what the values exceed
            the nearest representable ones by into the result.
        operands: what `error` needs of every column, `[columns, out, ...]` each.
        shift: to be added to the values before, `[columns, out]`; None: nothing. It leaves errors as they are.
        rule: what `error` computes, for kernels that compute the same. `grid`: to multiples of the operand, from
            `codes[0]` to `codes[1]` times it. `signs`: to the sum of the operands with a sign each, the larger first.
            `table`: to the first operand's entries, ascending, between which the second has the boundaries. None: only
            `error` knows.
        codes: of a `grid`, the lowest and the highest.
    """

    error: Callable[..., object]
    operands: tuple[Tensor, ...]
    shift: Tensor | None = None
    rule: Rule | None = None
    codes: tuple[int, int] = (0, 0)

    @staticmethod
    def stack(rounders: Sequence[Rounder]) -> Rounder:
        """Rounders of one format as one, for the rows of all of them."""
        import torch

        first, *others = rounders
        if not others:
            return first
        operands = tuple(torch.cat(parts, 1) for parts in zip(*(part.operands for part in rounders), strict=True))
        shifts = [part.shift for part in rounders if part.shift is not None]
        return replace(first, operands=operands, shift=torch.cat(shifts, 1) if shifts else None)


class Format(BaseModel):
    """How the codes and tables of one linear layer represent its weight.

    Subclasses define the values (`encode`, `decode`) and the tensors on disk (`stored`, `to_stored`, `from_stored`);
    training needs the rest. Shapes are `(out_features, in_features)`; tables keep their stored dtype, arithmetic is
    float32. Where a method takes float tables, these are what `float_tables` returns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str]

    bits: int = Field(ge=1, le=8)  # of a weight's code

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded to codes. If not, nothing can be trained or compensated."""
        return True

    @property
    def trains_tables(self) -> bool:
        """Whether any of its tables can be trained."""
        return True

    @property
    def has_output_norm(self) -> bool:
        """Whether a LayerNorm without parameters follows the layer: weight and bias alone do not describe it then."""
        return False

    @property
    def adds_bias_after_norm(self) -> bool:
        """Whether the layer computes `LayerNorm(Y) + bias`, as OneBit does, and not `LayerNorm(Y + bias)`."""
        return False

    def attach(self, module: nn.Module) -> None:
        """Add what the format does besides `x W_hat^T + bias` to a linear module; survives copying and pickling."""
        if self.has_output_norm and self.adds_bias_after_norm and module.bias is not None:
            module.register_forward_pre_hook(_withhold_bias)
            module.register_forward_hook(_normalize_and_add_bias, always_call=True)
        elif self.has_output_norm:
            module.register_forward_hook(_normalize)

    def stored(self, shape: tuple[int, int]) -> dict[str, StoredTensor]:
        """Tensors on disk for a weight of `shape`, by suffix; `weight_packed` are the codes, by `pack_bits`, and
        missing where `rounds` is false."""
        raise NotImplementedError

    def to_stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that `stored` describes, bit-packed."""
        raise NotImplementedError

    def from_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        """Inverse of `to_stored`; of the codes, only the rows that `weight_packed` has."""
        raise NotImplementedError

    def encode(self, weight: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """Codes of the nearest levels: float `[out, in]` -> uint8 `[out, in]`."""
        raise NotImplementedError

    def decode(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """The weight, float32 `[out, in]`; differentiable in floating-point tables."""
        raise NotImplementedError

    def decode_as(self, codes: Tensor, tables: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """`decode`, rounded to `dtype`; where that is cheaper in one pass, a format overrides it."""
        return self.decode(codes, tables).to(dtype)

    def float_tables(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Dequantize the tables: float32, with the same `decode`, so that training can move them.

        Integer tables without a scale, such as zero points, stay integers.
        """
        return {name: table.float() if table.is_floating_point() else table for name, table in tables.items()}

    def round_tables(self, tables: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Round float tables to the nearest ones that can be stored: the inverse of `float_tables`.

        Args:
            tables: float tables.
            initial: stored tables. Entries of `tables` that would become 0 or infinite in their dtype, and tables that
                are not trained, are taken from here.
        """
        rounded = dict(initial)
        for name, table in initial.items():
            if table.is_floating_point():
                nearest = tables[name].to(table.dtype)
                rounded[name] = nearest.where(nearest / nearest == 1, table)  # 0 / 0 and inf / inf are NaN
        return rounded

    def table_units(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scale of each entry's learning rate, so that one rate fits all: for every table that can be trained, in a
        shape that broadcasts to it. By default an entry's own magnitude, at least a tenth of the table's mean.

        Args:
            tables: float tables.
        """
        sizes = {name: table.abs() for name, table in tables.items() if table.is_floating_point()}
        return {name: size.clamp(min=0.1 * float(size.mean())) for name, size in sizes.items()}

    def step_sizes(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """Quantization step at each weight: the distance from its value to the nearest other level, float32
        `[out, in]`. By default of levels that are evenly spaced and ordered like their codes."""
        return (self.decode(codes ^ 1, tables) - self.decode(codes, tables)).abs()

    def initial_latents(self, target: Tensor, value: Tensor, step: Tensor) -> Tensor:
        """Latent weights to start training at: float32 `[out, in]`. By default as near to `target` as they can be
        without leaving their codes.

        Args:
            target: float32 `[out, in]`, the weight that was quantized.
            value: float32 `[out, in]`, the decoded weight.
            step: float32 `[out, in]`, its quantization steps.
        """
        return value + (target - value).clamp(-_MAX_OFFSET * step, _MAX_OFFSET * step)

    def ste_slope(self, latent: Tensor, value: Tensor, step: Tensor) -> Tensor:
        """Derivative of values by their latent weights in the straight-through estimator: `[out, in]`, float or bool.
        By default 1 where the latent is within a step of its value, 0 elsewhere: clipped weights get no gradient."""
        return (latent - value).abs_() <= step

    def trained_latents(self, weight: QuantizedWeight, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is trained behind the codes: latent weights in units in which one learning rate fits all.

        Args:
            target: float32 `[out, in]`, the weight that was quantized.

        Returns:
            Where they start, exactly at the codes, float32 `[out, in]`; and their units of the same shape, by default
            quantization steps. Without units, tables and latents alone give the codes.
        """
        import torch

        dense, units = weight.dense(), self.step_sizes(weight.codes, weight.tables).clamp(min=_SMALLEST_UNIT)
        latents = self.initial_latents(target, dense, units) / units
        recoded = self.latent_codes(latents, units, weight.tables) != weight.codes
        return torch.where(recoded, dense / units, latents), units

    def latent_codes(self, latents: Tensor, units: Tensor | None, tables: Mapping[str, Tensor]) -> Tensor:
        """Codes of `trained_latents`, uint8 `[out, in]`."""
        assert units is not None
        return self.encode(units * latents, tables)

    def fake_quantize(
        self, latents: Tensor, units: Tensor | None, tables: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """The decoded weight of `latent_codes`, `[out, in]`: gradients reach float tables as in `decode`, and latents
        straight through their rounding, times `ste_slope`."""
        import torch

        from qcli.core.straight_through import straight_through

        assert units is not None
        latent = units * latents
        with torch.no_grad():
            codes = self.encode(latent, tables)
        value = self.decode(codes, tables)
        slope = self.ste_slope(latent.detach(), value.detach(), units)
        return straight_through(value, latent, slope).to(dtype)

    @property
    def alike(self) -> bool:
        """Whether `as_rows` makes one kind of weight of layers of different shapes, so that many are trained as one."""
        return False

    def as_rows(self, weight: QuantizedWeight) -> QuantizedWeight:
        """If `alike`, a weight whose rows are the groups of `weight`, a shorter last group of a row filled up: rows do
        not depend on each other. Otherwise the weight itself."""
        return weight

    def from_rows(self, rows: QuantizedWeight, shape: tuple[int, int]) -> QuantizedWeight:
        """Inverse of `as_rows`, for a weight of `shape` in this format; views where possible."""
        return rows

    def values_as_rows(self, values: Tensor) -> Tensor:
        """Of any `[out, in]`, the rows that its weights have in `as_rows`."""
        return values

    def values_from_rows(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """Inverse of `values_as_rows`; a view."""
        return rows

    def slice_rows(self, tables: Mapping[str, Tensor], rows: slice) -> Mapping[str, Tensor]:
        """Tables that decode these rows of the codes; views. By default each table has one entry per row."""
        return {name: table[rows] for name, table in tables.items()}

    @property
    def column_step(self) -> int | None:
        """Where `cut` can cut: at multiples of this number of columns. None: this format cannot be cut, and
        tensor-parallel engines (vLLM) do not load it."""
        return None

    def cut(self, tables: Mapping[str, Tensor], rows: slice, columns: slice) -> tuple[Format, Mapping[str, Tensor]]:
        """Tables that decode this part of the codes to the same values, and their format; views where possible.

        Args:
            tables: of the whole weight, in the dtypes they are stored in.
            rows, columns: with start and stop; columns start at a multiple of `column_step`, and end at one or at the
                last column.
        """
        raise NotImplementedError

    def rounder(self, tables: Mapping[str, Tensor], columns: Tensor) -> Rounder:
        """Rounds these columns one at a time, as error feedback (GPTQ) does; `encode` gives the results' codes.

        Args:
            tables: of the whole weight.
            columns: int64 `[n]`, in the order of their rounding.
        """
        raise NotImplementedError

    def check(self, weight: QuantizedWeight) -> None:
        """Raise VerificationError unless shapes, dtypes and values are valid in this format."""
        raise NotImplementedError

    @property
    def largest_weight(self) -> float:
        """Largest magnitude of weights whose scales certainly fit their dtype, float16 by default."""
        return LARGEST_SCALE / 2

    def imprecise_scales(self, weight: QuantizedWeight, target: Tensor) -> Tensor:
        """How many scales are too small for the full precision of their dtype, int64 of one element; those of weights
        that are all 0 do not count. By default none.

        Args:
            target: float32 `[out, in]`, the weight that was quantized.
        """
        import torch

        return torch.zeros((), dtype=torch.int64, device=target.device)

    def facts(self, weight: QuantizedWeight) -> dict[str, float]:
        """Further statistics of a weight of this format, by name."""
        return {}

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Bits of all stored tensors of a layer, divided by its number of weights."""
        return 8 * sum(tensor.bytes for tensor in self.stored(shape).values()) / prod(shape)

    def spec(self) -> dict[str, Any]:
        """Name and fields, as `from_spec` reads them."""
        return {"format": self.name, **self.model_dump()}


def _normalize(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
    """OneBit's LayerNorm (arXiv 2402.11295) over each token's outputs: torch's epsilon, float32."""
    from torch.nn import functional as F

    return F.layer_norm(output.float(), output.shape[-1:]).to(output.dtype)


def _withhold_bias(module: nn.Module, _: tuple[Any, ...]) -> None:
    """Replace the bias by zeros until the output has been normalized: taking it off the sum would cost precision."""
    import torch

    bias = module._parameters["bias"]
    assert bias is not None
    module.__dict__["_withheld_bias"] = bias
    module._parameters["bias"] = torch.zeros_like(bias)  # type: ignore[assignment]


def _normalize_and_add_bias(module: nn.Module, inputs: tuple[Any, ...], output: Tensor | None) -> Tensor | None:
    """Put the bias back, even if the layer failed, and add it to the normalized output."""
    bias: nn.Parameter | None = module.__dict__.pop("_withheld_bias", None)
    if bias is None:  # a hook before `_withhold_bias` stopped the forward pass
        return None
    module._parameters["bias"] = bias
    if output is None:
        return None
    return _normalize(module, inputs, output) + bias.to(output.dtype)


def from_spec(spec: Mapping[str, Any]) -> Format:
    """The format of a spec, as `Format.spec` returns it.

    Raises:
        VerificationError: an unknown format; a missing, unknown or invalid field.
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
