"""Another format plus a low-rank term: `w_hat = base + A B` (LoRC, arXiv 2303.08302, section 5).

The factors are float16, or 8-bit integers with one float16 scale for each column of A and each row of B. The paper
only says 8 bits; the granularity is ours: a scale for each row of A would cost `16 * out` bits in place of
`32 * rank`, and the entries of one direction are of similar size in all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from qcli.core.formats._tables import check_tables, symmetric_int8
from qcli.core.weight import Format, from_spec
from qcli.utils.dtypes import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["LowRank"]

FactorBits = Literal[8, 16]
Factor = Literal["a", "b"]


class LowRank(Format):
    """The format `base` with `A [out, rank] @ B [rank, in]` added to its decoded weight.

    Tables: those of `base`, and `lowrank_a`, `lowrank_b`: float16, or int8 with `lowrank_a_scale`, `lowrank_b_scale`
    float16 `[rank]`. Codes are those of `base`.
    """

    name: ClassVar[str] = "low-rank"

    rank: int = Field(ge=1)
    factor_bits: FactorBits
    base: Format

    @classmethod
    def around(cls, base: Format, rank: int, factor_bits: FactorBits) -> Self:
        """`base` with a low-rank term."""
        return cls(bits=base.bits, rank=rank, factor_bits=factor_bits, base=base)

    @field_validator("base", mode="before")
    @classmethod
    def _from_spec(cls, base: Any) -> Any:
        if isinstance(base, cls) or (isinstance(base, Mapping) and base.get("format") == cls.name):
            raise ValueError("a low-rank format cannot be the base of another")
        return from_spec(base) if isinstance(base, Mapping) else base

    @model_validator(mode="after")
    def _same_bits(self) -> Self:
        if self.bits != self.base.bits:
            raise ValueError(f"bits is {self.bits}, its base has {self.base.bits}")
        return self

    @property
    def has_output_norm(self) -> bool:
        return self.base.has_output_norm

    @property
    def adds_bias_after_norm(self) -> bool:
        return self.base.adds_bias_after_norm

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "base": self.base.spec()}

    def stored(self, shape: tuple[int, int]) -> dict[str, StoredTensor]:
        return {**self.base.stored(shape), **self._stored_factors(shape)}

    def to_stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        factors = {name: weight.tables[name].contiguous() for name in self._stored_factors(weight.shape)}
        return {**self.base.to_stored(self._without_factors(weight)), **factors}

    def from_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        return self.wrap(
            self.base.from_stored(tensors, shape), {name: tensors[name] for name in self._stored_factors(shape)}
        )

    def wrap(self, weight: QuantizedWeight, factors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Add factors, as `round_factor` returns them, to a weight of `base`."""
        from qcli.core.weight import QuantizedWeight

        return QuantizedWeight(self, weight.shape, weight.codes, {**weight.tables, **factors})

    def encode(self, weight: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        return self.base.encode(weight.float() - self.product(tables), self._of_base(tables))

    def decode(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        return self.base.decode(codes, self._of_base(tables)) + self.product(tables)

    def step_sizes(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        return self.base.step_sizes(codes, self._of_base(tables))

    def float_tables(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        factors = {"lowrank_a": self.factor("a", tables), "lowrank_b": self.factor("b", tables)}
        return {**self.base.float_tables(self._of_base(tables)), **factors}

    def round_tables(self, tables: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
        base = self.base.round_tables(self._of_base(tables), self._of_base(initial))
        if self.factor_bits == 16:
            return base | super().round_tables(tables, {name: initial[name] for name in initial if _is_factor(name)})
        return base | self.round_factor("a", tables["lowrank_a"]) | self.round_factor("b", tables["lowrank_b"])

    def table_units(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        factors = {name: table for name, table in tables.items() if _is_factor(name)}
        return self.base.table_units(self._of_base(tables)) | super().table_units(factors)

    def slice_rows(self, tables: Mapping[str, Tensor], rows: slice) -> Mapping[str, Tensor]:
        factors = {name: table for name, table in tables.items() if _is_factor(name)}
        return {**self.base.slice_rows(self._of_base(tables), rows), **factors, "lowrank_a": factors["lowrank_a"][rows]}

    @property
    def column_step(self) -> int | None:
        return self.base.column_step

    def cut(self, tables: Mapping[str, Tensor], rows: slice, columns: slice) -> tuple[Format, Mapping[str, Tensor]]:
        base, of_base = self.base.cut(self._of_base(tables), rows, columns)
        factors = {name: table for name, table in tables.items() if _is_factor(name)}
        factors |= {"lowrank_a": factors["lowrank_a"][rows], "lowrank_b": factors["lowrank_b"][:, columns]}
        return LowRank.around(base, self.rank, self.factor_bits), {**of_base, **factors}

    def check(self, weight: QuantizedWeight) -> None:
        check_tables(weight.tables, self._stored_factors(weight.shape))
        self.base.check(self._without_factors(weight))

    @property
    def largest_weight(self) -> float:
        return self.base.largest_weight

    def imprecise_scales(self, weight: QuantizedWeight, target: Tensor) -> Tensor:
        return self.base.imprecise_scales(self._without_factors(weight), target)

    def facts(self, weight: QuantizedWeight) -> dict[str, float]:
        return self.base.facts(self._without_factors(weight))

    def product(self, tables: Mapping[str, Tensor]) -> Tensor:
        """`A B`, float32 `[out, in]`."""
        return self.factor("a", tables) @ self.factor("b", tables)

    def factor(self, which: Factor, tables: Mapping[str, Tensor]) -> Tensor:
        """Factor A `[out, rank]` or B `[rank, in]`, float32; differentiable in floating-point tables."""
        values = tables[f"lowrank_{which}"]
        if values.is_floating_point():
            return values.float()
        scale = tables[f"lowrank_{which}_scale"].float()
        return values * (scale if which == "a" else scale[:, None])

    def round_factor(self, which: Factor, values: Tensor) -> dict[str, Tensor]:
        """Quantize a factor: float A `[out, rank]` or B `[rank, in]` -> its stored tables."""
        name = f"lowrank_{which}"
        if self.factor_bits == 16:
            return {name: values.half()}
        codes, scale = symmetric_int8(values, 0 if which == "a" else 1)
        return {name: codes, f"{name}_scale": scale.flatten()}

    def _stored_factors(self, shape: tuple[int, int]) -> dict[str, StoredTensor]:
        out_features, in_features = shape
        dtype = "F16" if self.factor_bits == 16 else "I8"
        factors = {
            "lowrank_a": StoredTensor(dtype, (out_features, self.rank)),
            "lowrank_b": StoredTensor(dtype, (self.rank, in_features)),
        }
        if self.factor_bits == 8:
            factors |= {f"{name}_scale": StoredTensor("F16", (self.rank,)) for name in factors}
        return factors

    def _without_factors(self, weight: QuantizedWeight) -> QuantizedWeight:
        from qcli.core.weight import QuantizedWeight

        return QuantizedWeight(self.base, weight.shape, weight.codes, self._of_base(weight.tables))

    @staticmethod
    def _of_base(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: table for name, table in tables.items() if not _is_factor(name)}


def _is_factor(table: str) -> bool:
    return table.startswith("lowrank_")
