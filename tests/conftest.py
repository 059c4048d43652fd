"""What tests everywhere need. Triton's interpreter runs the kernels where there is no GPU; it must be asked for before
Triton is imported."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def exact_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packed layers compute what dense ones do to the last bit: by the reference. A kernel's other order of sums is
    enough to move an activation to the next code of its grid."""
    from qcli.inference.backend import choose
    from qcli.inference.backends.cpu import Cpu

    monkeypatch.setattr(Cpu, "unavailable_reason", lambda self: "this test compares every bit")
    choose.cache_clear()
    yield
    choose.cache_clear()
