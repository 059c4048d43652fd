"""`fbgemm_fp8`: fp8 with a scale for each row (Llama 3.1 405B)."""

from __future__ import annotations

from typing import ClassVar

from qcli.models.encodings.modelopt import ModelOpt

__all__ = ["FbgemmFP8"]


class FbgemmFP8(ModelOpt):
    """Layers of FBGEMM."""

    method: ClassVar[str] = "fbgemm_fp8"
    unused: ClassVar[tuple[str, ...]] = (".input_scale_ub",)

    @property
    def description(self) -> str:
        return "fbgemm_fp8, scales by row"
