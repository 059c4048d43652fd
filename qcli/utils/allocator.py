"""How the C library keeps freed memory."""

from __future__ import annotations

import contextlib

_M_MMAP_THRESHOLD = -3
_LARGE = 8 << 20


def return_large_blocks() -> None:
    """Let freed tensors go back to the system at once.

    glibc raises the size from which it does so to that of whatever was freed last, and then keeps holes that the next
    block's tensors do not fit: a quarter of the peak of a run on the CPU. Elsewhere nothing happens.
    """
    import ctypes  # late: it costs every start of the command line

    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
