"""What a study's result says of its failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcli.study.study import StudyResult
from qcli.utils.errors import VerificationError


def result(*, done: int, failed: int, reasons: dict[str, int], exit_code: int = 0) -> StudyResult:
    return StudyResult(Path("x"), done, failed, kept=0, seconds=1.0, reasons=reasons, exit_code=exit_code)


def test_some_failures_fail_only_a_strict_study() -> None:
    some = result(done=3, failed=3, reasons={"out of memory": 2, "no such file": 1})
    some.require_success()
    with pytest.raises(VerificationError) as caught:
        some.require_success(strict=True)
    assert caught.value.message.splitlines() == [
        "3 of 6 runs failed: 2 with out of memory",
        "3 of 6 runs failed: 1 with no such file",
    ]
    assert caught.value.exit_code == 4
    result(done=2, failed=0, reasons={}).require_success(strict=True)


def test_if_all_fail_the_exit_code_is_theirs() -> None:
    every = result(done=0, failed=2, reasons={"out of memory": 2}, exit_code=5)
    for strict, code in ((False, 5), (True, 4)):
        with pytest.raises(VerificationError, match=r"^all 2 runs failed: out of memory$") as caught:
            every.require_success(strict=strict)
        assert caught.value.exit_code == code
