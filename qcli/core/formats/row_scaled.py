"""Another format with a power of two for each row: `w_hat[r] = 2^e[r] * base[r]`, for weights out of float16's range.

Tables of the formats are float16, whose full precision ends at 6e-5. A second-level scale that is a power of two costs
8 bits a row, and neither it nor its use rounds anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import field_validator, model_validator

from qcli.core.formats._tables import check_tables
from qcli.core.weight import Format, from_spec
from qcli.utils.dtypes import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["RowScaled"]

EXPONENT = "row_exponent"
_LEAST, _MOST = -126, 126  # exponents whose powers, and their inverses, are normal in float32


class RowScaled(Format):
    """The format `base`, of weights that are scaled by a power of two for each row.

    Tables: those of `base`, and `row_exponent` int8 `[out]`. Codes are those of `base`.
    """

    name: ClassVar[str] = "row-scaled"

    base: Format

    @classmethod
    def around(cls, base: Format) -> Self:
        """`base` with exponents."""
        return cls(bits=base.bits, base=base)

    @field_validator("base", mode="before")
    @classmethod
    def _from_spec(cls, base: Any) -> Any:
        if isinstance(base, Mapping) and base.get("format") == cls.name:
            raise ValueError("a row-scaled format cannot be the base of another")
        return from_spec(base) if isinstance(base, Mapping) else base

    @model_validator(mode="after")
    def _same_bits(self) -> Self:
        if self.bits != self.base.bits:
            raise ValueError(f"bits is {self.bits}, its base has {self.base.bits}")
        return self

    @staticmethod
    def exponents(weight: Tensor) -> Tensor:
        """Exponents that bring each row's largest magnitude to between 0.5 and 1: int8 `[out]`; 0 for rows of zeros.

        Args:
            weight: float32 `[out, in]`.
        """
        import torch

        exponent: Tensor = torch.frexp(weight.abs().amax(1)).exponent
        return exponent.clamp(_LEAST, _MOST).to(torch.int8)

    @staticmethod
    def shifted(rows: Tensor, exponent: Tensor) -> Tensor:
        """`2^exponent * rows`, exactly: `[out, ...]`, int8 `[out]`."""
        import torch

        power = torch.ldexp(torch.ones(len(exponent), device=rows.device), exponent.to(rows.device, torch.int32))
        return rows * power.view(-1, *(1 for _ in rows.shape[1:]))

    @property
    def has_output_norm(self) -> bool:
        return self.base.has_output_norm

    @property
    def adds_bias_after_norm(self) -> bool:
        return self.base.adds_bias_after_norm

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "base": self.base.spec()}

    def stored(self, shape: tuple[int, int]) -> dict[str, StoredTensor]:
        return {**self.base.stored(shape), EXPONENT: StoredTensor("I8", (shape[0],))}

    def to_stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {**self.base.to_stored(self._scaled(weight)), EXPONENT: weight.tables[EXPONENT].contiguous()}

    def from_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        return self.wrap(self.base.from_stored(tensors, shape), tensors[EXPONENT])

    def wrap(self, weight: QuantizedWeight, exponent: Tensor) -> QuantizedWeight:
        """A weight of `base`, scaled by `2^exponent`, int8 `[out]`."""
        from qcli.core.weight import QuantizedWeight

        return QuantizedWeight(self, weight.shape, weight.codes, {**weight.tables, EXPONENT: exponent})

    def encode(self, weight: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        return self.base.encode(self.shifted(weight.float(), -tables[EXPONENT]), _of_base(tables))

    def decode(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        return self.shifted(self.base.decode(codes, _of_base(tables)), tables[EXPONENT])

    def step_sizes(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        return self.shifted(self.base.step_sizes(codes, _of_base(tables)), tables[EXPONENT])

    def initial_latents(self, target: Tensor, value: Tensor, step: Tensor) -> Tensor:
        return self.base.initial_latents(target, value, step)  # relative to value and step in every format

    def ste_slope(self, latent: Tensor, value: Tensor, step: Tensor) -> Tensor:
        return self.base.ste_slope(latent, value, step)

    def float_tables(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**self.base.float_tables(_of_base(tables)), EXPONENT: tables[EXPONENT]}

    def round_tables(self, tables: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rounded = self.base.round_tables(_of_base(tables), _of_base(initial))
        return {**rounded, EXPONENT: initial[EXPONENT]}

    def table_units(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.base.table_units(_of_base(tables))

    def slice_rows(self, tables: Mapping[str, Tensor], rows: slice) -> Mapping[str, Tensor]:
        return {**self.base.slice_rows(_of_base(tables), rows), EXPONENT: tables[EXPONENT][rows]}

    @property
    def column_step(self) -> int | None:
        return self.base.column_step

    def cut(self, tables: Mapping[str, Tensor], rows: slice, columns: slice) -> tuple[Format, Mapping[str, Tensor]]:
        base, of_base = self.base.cut(_of_base(tables), rows, columns)
        return RowScaled.around(base), {**of_base, EXPONENT: tables[EXPONENT][rows]}

    def check(self, weight: QuantizedWeight) -> None:
        check_tables(weight.tables, {EXPONENT: self.stored(weight.shape)[EXPONENT]})
        self.base.check(self._scaled(weight))

    @property
    def largest_weight(self) -> float:
        return inf

    def imprecise_scales(self, weight: QuantizedWeight, target: Tensor) -> Tensor:
        return self.base.imprecise_scales(self._scaled(weight), target)

    def facts(self, weight: QuantizedWeight) -> dict[str, float]:
        return self.base.facts(self._scaled(weight))

    def _scaled(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The weight of `base` behind the exponents."""
        from qcli.core.weight import QuantizedWeight

        return QuantizedWeight(self.base, weight.shape, weight.codes, _of_base(weight.tables))


def _of_base(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: table for name, table in tables.items() if name != EXPONENT}
