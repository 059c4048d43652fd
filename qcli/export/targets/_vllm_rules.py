"""Which compressed-tensors checkpoints vLLM accepts: its rules, copied, since tests here cannot run vLLM.

From vllm-project/vllm, main of 2026: widths and the split of packed tensors from model_executor/layers/quantization/
compressed_tensors/schemes/compressed_tensors_wNaM.py (at c3b9c01), those of wNa16, w8a16_fp8 and
w4a16_nvfp4 beside it, Marlin's limits from model_executor/layers/quantization/utils/marlin_utils.py, the split of fused
layers and heads from model_executor/layers/linear.py (at 0036d38).
"""

from __future__ import annotations

from collections.abc import Mapping

from qcli.core.formats.affine import Affine
from qcli.core.formats.nvfp4 import BLOCK, NVFP4
from qcli.core.weight import Format
from qcli.export.target import Packable, Refusal
from qcli.models.families import Linear

SYMMETRIC_BITS, ASYMMETRIC_BITS = (2, 3, 4, 5, 6, 7, 8), (4, 8)
MARLIN_BITS, MARLIN_GROUPS, MARLIN_ROWS, MARLIN_COLUMNS = (4, 8), (-1, 32, 64, 128), 64, 128
RANKS = (1, 2, 4, 8)


def refusal(source: Packable, formats: Mapping[str, Format]) -> Refusal | None:
    """Why vLLM refuses the checkpoint even on a single device; None: by its rules it does not."""
    if (reason := _refusal(source, formats, 1)) is None:
        return None
    grids = [format for format in formats.values() if isinstance(format, Affine)]
    if not grids:
        return Refusal(reason, ())
    asymmetric = any(format.zero_point != "none" and format.bits not in ASYMMETRIC_BITS for format in grids)
    return Refusal(reason, ("--symmetric", "--bits 4") if asymmetric else ("--symmetric",))


def describe(source: Packable, formats: Mapping[str, Format]) -> str:
    """The tensor-parallel sizes that vLLM's rules allow, and why not others: a line for a person.

    Args:
        formats: by layer name, without a `refusal`.
    """
    refusals = {ranks: _refusal(source, formats, ranks) for ranks in RANKS}
    fits = [str(ranks) for ranks, reason in refusals.items() if reason is None]
    reason = next((f"; {ranks} not: {reason}" for ranks, reason in refusals.items() if reason), "")
    slower = "" if _marlin(source, formats) else "; outside of what its Marlin kernels take, so slower"
    return f"by its rules with tensor parallel {', '.join(fits)}{reason}{slower}"


def _refusal(source: Packable, formats: Mapping[str, Format], ranks: int) -> str | None:
    """The rule that forbids this number of devices; None: no rule does."""
    heads, kv_heads = _heads(source)
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        return f"{heads} heads, {kv_heads} of them for keys and values"
    for layer in source.linears():
        format = formats.get(layer.name)
        # With more devices than key/value heads, several devices hold the same head.
        parts = min(ranks, kv_heads) if layer.name.endswith((".k_proj", ".v_proj")) else ranks
        if format is not None and (reason := _misfit(layer, format, _splits_inputs(source, layer), parts)):
            return f"{layer.name} has {reason}"
    return None


def _misfit(layer: Linear, format: Format, splits_inputs: bool, ranks: int) -> str | None:
    """The rule that forbids splitting a layer into this many shards; None: no rule does."""
    symmetric = not isinstance(format, Affine) or format.zero_point == "none"
    if format.bits not in (SYMMETRIC_BITS if symmetric else ASYMMETRIC_BITS):
        return f"{format.bits} bits {'symmetric' if symmetric else 'asymmetric'}"
    rows, columns = layer.shape
    if (columns if splits_inputs else rows) % ranks:
        return f"{columns} inputs" if splits_inputs else f"{rows} outputs"
    if splits_inputs:
        columns //= ranks
        if isinstance(format, NVFP4) and columns % BLOCK:
            return f"{columns} inputs a device, blocks of {BLOCK}"
        if not isinstance(format, Affine):
            return None
        if format.group_size > 0 and columns % format.group_size:
            return f"{columns} inputs a device, groups of {format.group_size}"
        if ranks > 1 and columns * format.bits % 32:
            return f"{columns} inputs a device are no whole words"
    elif not symmetric and rows // ranks * format.bits % 32:
        return f"zero points of {rows // ranks} outputs are no whole words"
    return None


def _splits_inputs(source: Packable, layer: Linear) -> bool:
    """Whether the layer is split by inputs (output and down projections) and not by outputs."""
    return source.family.groups_of(layer.block)[layer.group].leads_out


def _marlin(source: Packable, formats: Mapping[str, Format]) -> bool:
    shapes = {layer.name: layer.shape for layer in source.linears()}
    return all(
        format.bits in MARLIN_BITS
        and (not isinstance(format, Affine) or format.group_size in MARLIN_GROUPS)
        and shapes[name][0] % MARLIN_ROWS == 0
        and shapes[name][1] % MARLIN_COLUMNS == 0
        for name, format in formats.items()
    )


def _heads(source: Packable) -> tuple[int, int]:
    text = source.hf_config().get_text_config()
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    return heads, int(getattr(text, "num_key_value_heads", None) or heads)
