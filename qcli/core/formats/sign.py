"""One bit per weight: `w_hat = out_scale * sign * in_scale`, OneBit's signs with rank-one magnitudes.

arXiv 2402.11295: `Y = ((X * g) sign(W)^T) * h`. Code 1 means +1, which is also the sign of 0. The scales may have
either sign; codes are those of the nearest value all the same. In the paper's own models a LayerNorm without
parameters follows each linear, and the bias is added to what it returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from qcli.core.formats._tables import SMALLEST_NORMAL_SCALE, check_tables
from qcli.core.weight import LARGEST_SCALE, Format, Rounder
from qcli.utils.dtypes import StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["Sign"]

IN_SCALE, OUT_SCALE = "in_scale", "out_scale"


class Sign(Format):
    """Signs with one scale for each input and one for each output.

    Tables: `in_scale` g float16 `[in]`, `out_scale` h float16 `[out, 1]`. With `output_norm` the layer is the paper's:
    it computes `LayerNorm(Y) + bias`, and latent weights are trained as in its authors' code: in units of the value's
    magnitude they start at `0.01 sign` and have the slope `1.001 - tanh^2` (except below a low-rank term). Checkpoints
    written before `bias_after_norm` existed lack it, and their layers compute `LayerNorm(Y + bias)`.
    """

    name: ClassVar[str] = "sign"

    bits: Literal[1] = 1
    output_norm: bool = False
    bias_after_norm: bool = False

    @property
    def has_output_norm(self) -> bool:
        return self.output_norm

    @property
    def adds_bias_after_norm(self) -> bool:
        return self.bias_after_norm

    def spec(self) -> dict[str, Any]:
        """Without `bias_after_norm` where nothing is normalized: such layers mean the same in every version."""
        spec = super().spec()
        return spec if self.output_norm else {key: spec[key] for key in spec if key != "bias_after_norm"}

    def stored(self, shape: tuple[int, int]) -> dict[str, StoredTensor]:
        out_features, in_features = shape
        return {
            "weight_packed": StoredTensor("I32", (out_features, -(-in_features // 32))),
            IN_SCALE: StoredTensor("F16", (in_features,)),
            OUT_SCALE: StoredTensor("F16", (out_features, 1)),
        }

    def to_stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        from qcli.core import packing

        tables = {name: weight.tables[name].contiguous() for name in (IN_SCALE, OUT_SCALE)}
        return {"weight_packed": packing.pack_bits(weight.codes, 1), **tables}

    def from_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        from qcli.core import packing
        from qcli.core.weight import QuantizedWeight

        codes = packing.unpack_bits(tensors["weight_packed"], 1, shape[1])
        return QuantizedWeight(self, shape, codes, {name: tensors[name] for name in (IN_SCALE, OUT_SCALE)})

    def encode(self, weight: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        import torch

        signs = tables[IN_SCALE].float().sign() * tables[OUT_SCALE].float().sign()
        return (weight.float() * signs >= 0).to(torch.uint8)

    def decode(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        return (2 * codes.float() - 1) * tables[IN_SCALE].float() * tables[OUT_SCALE].float()

    def initial_latents(self, target: Tensor, value: Tensor, step: Tensor) -> Tensor:
        return 0.01 * value if self.output_norm else super().initial_latents(target, value, step)

    def ste_slope(self, latent: Tensor, value: Tensor, step: Tensor) -> Tensor:
        if not self.output_norm:
            return super().ste_slope(latent, value, step)
        return 1.001 - (2 * latent / step.clamp(min=1e-30)).tanh().square()

    def fake_quantize(
        self, latents: Tensor, units: Tensor | None, tables: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """As for all formats; on a GPU in two passes over the weight."""
        from qcli.utils import triton_kernels

        assert units is not None
        if not triton_kernels.serve(latents.device):
            return super().fake_quantize(latents, units, tables, dtype)
        from qcli.core.fake_sign import fake_sign

        scales = tables[IN_SCALE].float(), tables[OUT_SCALE].float()
        return fake_sign(latents, units, *scales, dtype, smooth=self.output_norm)

    def slice_rows(self, tables: Mapping[str, Tensor], rows: slice) -> Mapping[str, Tensor]:
        return {IN_SCALE: tables[IN_SCALE], OUT_SCALE: tables[OUT_SCALE][rows]}

    @property
    def column_step(self) -> int:
        return 1

    def cut(self, tables: Mapping[str, Tensor], rows: slice, columns: slice) -> tuple[Format, Mapping[str, Tensor]]:
        return self, {IN_SCALE: tables[IN_SCALE][columns], OUT_SCALE: tables[OUT_SCALE][rows]}

    def rounder(self, tables: Mapping[str, Tensor], columns: Tensor) -> Rounder:
        import torch

        magnitude = (tables[IN_SCALE].float()[columns][:, None] * tables[OUT_SCALE].float()[:, 0]).abs_()

        def error(values: Tensor, result: Tensor, magnitude: Tensor) -> None:
            torch.sub(values, torch.copysign(magnitude, values, out=result), out=result)

        return Rounder(error, (magnitude,), rule="signs")

    def check(self, weight: QuantizedWeight) -> None:
        stored = self.stored(weight.shape)
        tables, too_large = {name: stored[name] for name in (IN_SCALE, OUT_SCALE)}, weight.codes.max() > 1
        check_tables(weight.tables, tables, {"a code does not fit 1 bit": too_large})

    @property
    def largest_weight(self) -> float:
        return LARGEST_SCALE**2

    def imprecise_scales(self, weight: QuantizedWeight, target: Tensor) -> Tensor:
        """One input scale far below the others is as exact as its share of the outputs needs; all of them are not."""
        in_scale, out_scale = (weight.tables[name].abs().flatten() for name in (IN_SCALE, OUT_SCALE))
        nonzero, all_small = target != 0, in_scale.max() < SMALLEST_NORMAL_SCALE
        of_rows = ((out_scale < SMALLEST_NORMAL_SCALE) & nonzero.any(1)).sum()
        return of_rows + (all_small & nonzero.any(0)).sum()
