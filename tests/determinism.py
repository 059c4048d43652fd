"""Operations that have no deterministic algorithm on a GPU, found on a CPU: what a GPU would refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qcli.utils.determinism import deterministic

# Those that torch's documentation of `use_deterministic_algorithms` says to raise, by their names below autograd.
_REFUSED = {
    *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
    *("max_unpool2d", "max_unpool3d", "reflection_pad1d_backward", "reflection_pad2d_backward"),
    *("reflection_pad3d_backward", "upsample_linear1d_backward", "upsample_bilinear2d_backward"),
    *("upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "grid_sampler_2d_backward"),
    *("grid_sampler_3d_backward", "nll_loss2d_forward", "_ctc_loss_backward", "put_", "put", "histc", "kthvalue"),
}


def refused(name: str, overload: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a GPU refuses an operation."""
    if name == "cumsum":
        return isinstance(args[0], Tensor) and args[0].is_floating_point() and kwargs.get("dtype") is None
    if name in ("median", "nanmedian"):
        return overload.startswith("dim")
    if name == "bincount":
        return len(args) > 1 or kwargs.get("weights") is not None
    if name == "scatter_reduce":
        return "prod" in args
    return name in _REFUSED


_REFUSING = 2  # mode of torch in which it does; in mode 1, it warns


class Watching(TorchDispatchMode):
    """Collects, while deterministic algorithms are asked for, the operations that a GPU would refuse."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, overload = func.overloadpacket.__name__, func._overloadname
        if torch.get_deterministic_debug_mode() == _REFUSING and refused(name, overload, args, kwargs or {}):
            self.found.add(name)
        return func(*args, **kwargs or {})


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """torch's settings are those of a deterministic run on a GPU, and nothing inside may need what a GPU refuses."""
    with deterministic(torch.device("cuda")), Watching() as watching:
        yield
    assert not watching.found, f"a GPU refuses {sorted(watching.found)}"
