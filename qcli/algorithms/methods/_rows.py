"""The option of every method that rounds: rows scaled by powers of two before anything is fitted."""

from __future__ import annotations

from pydantic import Field

from qcli.algorithms.method import Method


class RowScaledMethod(Method):
    """A method whose format may have a power of two for each row."""

    row_exponents: bool = Field(
        default=False,
        description="store a power of two for each row (8 bits), for weights whose scales float16 cannot hold",
    )

    @property
    def scales_rows(self) -> bool:
        return self.row_exponents
