"""Commands in forks of one process that has everything imported: a command takes as long as its work."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.inject import Fault, Injector

_HANG = 300.0  # seconds, on a busy machine
_MEMORY = 4 << 30  # bytes that a command may take


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
        environment |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # `--quiet` comes after the imports
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
        counted: bool = True,
        limit: float = _HANG,
    ) -> Ended:
        """Run a command in `watched`.

        Args:
            fault: at a call on the files of `watched`.
            kill_after: a signal, and the seconds after which it is sent.
            environment: variables that are changed.
            counted: whether calls are counted, and can fail.
            limit: seconds after which the command hangs.
        """
        request = [list(map(str, arguments)), str(watched), fault, kill_after, environment or {}, counted, limit]
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Ended(*json.loads(self._server.stdout.readline()))


@cache
def fork_server() -> ForkServer:
    """The one of this process."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def _serve() -> None:
    _import_everything()
    for line in sys.stdin:
        arguments, watched, fault, kill_after, environment, counted, limit = json.loads(line)
        with tempfile.TemporaryDirectory(prefix="qcli-fork-") as folder:
            for name in ("out", "err"):  # a child may be killed before it writes
                (Path(folder) / name).touch()
            child = os.fork()
            if child == 0:
                os.environ.update(environment)
                _run(arguments, Path(watched), fault and Fault(*fault), Path(folder), counted=counted)
            started = time.monotonic()
            code = _wait(child, kill_after, limit)
            seconds = time.monotonic() - started
            calls, fired = 0, None
            with contextlib.suppress(OSError, ValueError):
                calls, fired = json.loads((Path(folder) / "calls").read_text())
            texts = [(Path(folder) / name).read_text(errors="replace") for name in ("out", "err")]
        print(json.dumps([code, *texts, calls, fired, seconds]), flush=True)


def _wait(child: int, kill_after: tuple[str, float] | None, limit: float) -> int | None:
    started, hung = time.monotonic(), False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return None if hung else os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - started
        if kill_after is not None and passed >= kill_after[1]:
            os.kill(child, getattr(signal, kill_after[0]))
            kill_after = None
        if passed > limit:
            os.kill(child, signal.SIGKILL)
            hung = True
        select.select([], [], [], 0.002)


def _run(arguments: list[str], watched: Path, fault: Fault | None, folder: Path, *, counted: bool) -> None:
    """Run a command and end the process."""
    os.chdir(watched)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    for name, descriptor in (("out", 1), ("err", 2)):
        opened = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = io.StringIO()
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    injector, code = Injector(watched, fault), 1
    real_open, real_exit = os.open, os._exit
    if counted:
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
    """What commands import late, and the CPU kernels."""
    import importlib
    import pkgutil

    import qcli

    skipped = ("qcli.__main__", "qcli.inference.vllm", "qcli.study.ray")
    for module in pkgutil.walk_packages(qcli.__path__, "qcli."):
        if module.name.startswith(skipped):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # a package of another platform
            if (error.name or "qcli").startswith("qcli"):
                raise
    for name in (
        "transformers.models.llama",
        "transformers.models.auto",
        "lm_eval.models.huggingface",
        "lm_eval.tasks",
    ):
        importlib.import_module(name)
    from qcli.inference.backends.cpu import kernels

    kernels()  # built once: the commands have caches of their own
    for name in ("datasets", "pyarrow.parquet", "gguf"):
        importlib.import_module(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

    _: Any = (AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast)


if __name__ == "__main__":
    _serve()
