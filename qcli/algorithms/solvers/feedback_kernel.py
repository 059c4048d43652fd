"""A block of columns of error feedback in one launch: rows do not depend on each other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcli.core.weight import Rounder

WIDTH = 128  # columns of a launch at most: their errors are kept in registers
ROWS = 16  # of a program
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2**23: a float32 that is added to it loses its fraction, half to even


def round_columns(block: Tensor, relative: Tensor, rounder: Rounder, asymmetry: Tensor | None) -> Tensor:
    """`feedback._round_columns`, whose sums it adds in another order, for rounders with a rule.

    Args:
        block: `[n, out]`, contiguous; becomes the rounded values.
        relative, asymmetry: `[n, n]`, the latter None for 0.

    Returns:
        The error of each column, `[n, out]`.
    """
    assert rounder.rule is not None
    errors, operands = torch.empty_like(block), [operand.contiguous() for operand in rounder.operands]
    shift = None if rounder.shift is None else rounder.shift.contiguous()
    for start in range(0, len(block), WIDTH):
        step, rest = slice(start, min(start + WIDTH, len(block))), slice(start + WIDTH, len(block))
        torch.ops.qcli.round_columns(
            block[step],
            errors[step],
            relative[step, step].T.contiguous(),
            None if asymmetry is None else asymmetry[step, step].T.contiguous(),
            None if shift is None else shift[step],
            [operand[step] for operand in operands],
            rounder.rule,
            rounder.codes,
        )
        if rest.start < rest.stop:
            block[rest].addmm_(relative[step, rest].T, errors[step], alpha=-1)
            if asymmetry is not None:
                block[rest].addmm_(asymmetry[step, rest].T, block[step] + errors[step])
    return errors


@torch.library.custom_op("qcli::round_columns", mutates_args=("block", "errors"))
def _launch(
    block: Tensor,
    errors: Tensor,
    taken: Tensor,
    added: Tensor | None,
    shift: Tensor | None,
    operands: list[Tensor],
    rule: str,
    codes: list[int],
) -> None:
    """The launch as an operator, which counts as one operation."""
    columns, rows = block.shape
    rule = "two signs" if rule == "signs" and len(operands) > 1 else rule
    with torch.cuda.device_of(block):
        round_block[(triton.cdiv(rows, ROWS),)](
            block,
            errors,
            taken,
            taken if added is None else added,
            block if shift is None else shift,
            operands[0],
            operands[-1],
            columns,
            rows,
            RULE=rule,
            LOWEST=codes[0],
            HIGHEST=codes[1],
            ENTRIES=operands[0].shape[-1] if rule == "table" else 0,
            SHIFT=shift is not None,
            ADDED=added is not None,
            COLUMNS=triton.next_power_of_2(columns),
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=True,
        )


@triton.jit
def _signed(magnitude, like):
    return tl.where(like < 0, -magnitude, magnitude)


@triton.constexpr_function
def _steps(entries):
    return entries.bit_length() - 1


@triton.jit
def _errors(
    values, first_ptr, second_ptr, place, inside, RULE: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """What values exceed the nearest representable ones by, as `Rounder.error`."""
    if RULE == "grid":
        scale = tl.load(first_ptr + place, mask=inside, other=1.0)
        code = tl.clamp(tl.div_rn(values, scale), 1.0 * LOWEST, 1.0 * HIGHEST, propagate_nan=tl.PropagateNan.ALL)
        errors = values - ((code + _TO_INTEGER) - _TO_INTEGER) * scale
    elif RULE == "table":
        code = (place * 0).to(tl.int64)
        boundaries = second_ptr + place.to(tl.int64) * (ENTRIES - 1)
        for step in tl.static_range(_steps(ENTRIES)):  # binary search
            boundary = tl.load(boundaries + code + ((ENTRIES >> (step + 1)) - 1), mask=inside, other=0.0)
            code += tl.where(boundary < values, ENTRIES >> (step + 1), 0)
        errors = values - tl.load(first_ptr + place.to(tl.int64) * ENTRIES + code, mask=inside, other=0.0)
    else:
        errors = values - _signed(tl.load(first_ptr + place, mask=inside, other=0.0), values)
        if RULE == "two signs":
            errors -= _signed(tl.load(second_ptr + place, mask=inside, other=0.0), errors)
    return errors


@triton.jit(do_not_specialize=["columns"])
def round_block(
    block_ptr,
    errors_ptr,
    taken_ptr,
    added_ptr,
    shift_ptr,
    first_ptr,
    second_ptr,
    columns,
    rows,
    RULE: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    ENTRIES: tl.constexpr,
    SHIFT: tl.constexpr,
    ADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Round columns in turn, `[columns, rows]` in place; each first takes what the errors of those before it leave.

    taken, added: what an error (a value) of 1 in column k takes from column c (adds to it), `[c, k]`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, before = row < rows, tl.arange(0, COLUMNS)
    errors = tl.zeros([COLUMNS, ROWS], tl.float32)
    values = tl.zeros([COLUMNS, ROWS], tl.float32)
    for column in range(columns):
        place = column * rows + row
        taken = tl.load(taken_ptr + column * columns + before, mask=before < column, other=0.0)
        value = tl.load(block_ptr + place, mask=inside, other=0.0) - tl.sum(errors * taken[:, None], axis=0)
        if ADDED:
            added = tl.load(added_ptr + column * columns + before, mask=before < column, other=0.0)
            value += tl.sum(values * added[:, None], axis=0)
            values = tl.where(before[:, None] == column, value[None, :], values)
        shifted = value
        if SHIFT:
            shifted += tl.load(shift_ptr + place, mask=inside, other=0.0)
        error = _errors(shifted, first_ptr, second_ptr, place, inside, RULE, LOWEST, HIGHEST, ENTRIES)
        tl.store(errors_ptr + place, error, mask=inside)
        tl.store(block_ptr + place, value - error, mask=inside)
        errors = tl.where(before[:, None] == column, error[None, :], errors)
