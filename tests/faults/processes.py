"""Commands in forks of one process that has everything imported: a command takes as long as its work."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.inject import Fault, Injector

_HANG = 300.0  # seconds, on a busy machine


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: exit code; negative: the signal that killed it; None: it hung, and was killed.
        calls: on files of the watched folder.
        fired: the call that failed; None: none did.
        seconds: it took.
    """

    code: int | None
    out: str
    err: str
    calls: int
    fired: str | None
    seconds: float


class ForkServer:
    """A process that forks one child for each command."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def close(self) -> None:
        """End it."""
        self._server.kill()
        self._server.communicate()

    def run(
        self,
        arguments: Sequence[object],
        *,
        watched: Path,
        fault: Fault | None = None,
        kill_after: tuple[str, float] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Ended:
        """Run a command in `watched`.

        Args:
            fault: at a call on the files of `watched`.
            kill_after: a signal, and the seconds after which it is sent.
            environment: variables that are changed.
        """
        request = [list(map(str, arguments)), str(watched), fault, kill_after, environment or {}]
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Ended(*json.loads(self._server.stdout.readline()))


def _serve() -> None:
    _import_everything()
    for line in sys.stdin:
        arguments, watched, fault, kill_after, environment = json.loads(line)
        with tempfile.TemporaryDirectory(prefix="qcli-fork-") as folder:
            for name in ("out", "err"):  # a child may be killed before it writes
                (Path(folder) / name).touch()
            child = os.fork()
            if child == 0:
                os.environ.update(environment)
                _run(arguments, Path(watched), fault and Fault(*fault), Path(folder))
            started = time.monotonic()
            code = _wait(child, kill_after)
            seconds = time.monotonic() - started
            calls, fired = 0, None
            with contextlib.suppress(OSError, ValueError):
                calls, fired = json.loads((Path(folder) / "calls").read_text())
            texts = [(Path(folder) / name).read_text(errors="replace") for name in ("out", "err")]
        print(json.dumps([code, *texts, calls, fired, seconds]), flush=True)


def _wait(child: int, kill_after: tuple[str, float] | None) -> int | None:
    started, hung = time.monotonic(), False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return None if hung else os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - started
        if kill_after is not None and passed >= kill_after[1]:
            os.kill(child, getattr(signal, kill_after[0]))
            kill_after = None
        if passed > _HANG:
            os.kill(child, signal.SIGKILL)
            hung = True
        select.select([], [], [], 0.002)


def _run(arguments: list[str], watched: Path, fault: Fault | None, folder: Path) -> None:
    """Run a command and end the process."""
    os.chdir(watched)
    for name, descriptor in (("out", 1), ("err", 2)):
        opened = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = io.StringIO()
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    injector, code = Injector(watched, fault), 1
    real_open, real_exit = os.open, os._exit
    injector.install()
    try:
        from qcli.cli.main import main

        main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        descriptor = real_open(folder / "calls", os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, json.dumps([injector.calls, injector.fired]).encode())
        real_exit(code)


def _import_everything() -> None:
    """What commands import late."""
    import importlib
    import pkgutil

    import qcli

    skipped = ("qcli.__main__", "qcli.inference.vllm", "qcli.study.ray")
    for module in pkgutil.walk_packages(qcli.__path__, "qcli."):
        if not module.name.startswith(skipped):
            importlib.import_module(module.name)
    for name in ("llama", "auto"):
        importlib.import_module(f"transformers.models.{name}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

    _: Any = (AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast)


if __name__ == "__main__":
    _serve()
