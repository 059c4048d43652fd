"""The fault injector: one call fails, the one that was named."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.faults.inject import Fault, Injector


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC"])
def test_only_the_named_call_fails(kind: str, tmp_path: Path) -> None:
    injector = Injector(tmp_path, Fault(kind, 2))
    injector.happens("open", tmp_path / "a")
    with pytest.raises(OSError) as caught:
        injector.happens("write", tmp_path / "a")
    injector.happens("close", tmp_path / "a")
    assert caught.value.errno == getattr(errno, kind)
    assert (injector.calls, injector.fired) == (3, f"write {tmp_path / 'a'}")
