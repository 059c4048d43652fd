"""`mxfp8`: fp8 in blocks of 32 with exponents of two as scales, named as those of `fp8`."""

from __future__ import annotations

from typing import ClassVar

from qcli.models.encodings.fp8 import FP8

__all__ = ["MXFP8"]


class MXFP8(FP8):
    """Weights with exponents as scales."""

    method: ClassVar[str] = "mxfp8"
