"""Short imports: what torch and transformers would import, and no command uses, is left out.

transformers imports scipy for losses of image models, parts of `torch.distributed` for sharded loading, and torch's
compiler (which imports triton, sympy and FSDP) to decorate a few functions; torch imports its compiler to compute on
the meta device. In the program qcli, transformers hears that the first two are not installed, a case that it supports;
and functions are decorated without the compiler, which they ask for once it is there. `import qcli` alone changes
nothing in transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from qcli.utils.distributed import world_size

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec

_AVAILABILITY = "transformers.utils.import_utils"
_ABSENT = ("is_scipy_available", "is_torch_distributed_available")
_DECORATING = (  # or importing what decorates; whichever comes first
    *("transformers.modeling_utils", "transformers.masking_utils", "transformers.generation.utils"),
    *("transformers.models.auto.modeling_auto", "transformers.activations", "transformers.integrations.hub_kernels"),
)
_COMPILER = "torch._dynamo"
_INDEXING = f"{_COMPILER}._trace_wrapped_higher_order_op"


def import_little() -> None:
    """Make the first import of transformers in this process a short one.

    Nothing changes where transformers is imported already, or where `torchrun` started several processes.
    """
    if "transformers" not in sys.modules and world_size() == 1:
        sys.meta_path.insert(0, _Finder())


@contextmanager
def without_compiler() -> Iterator[None]:
    """While open, `torch._dynamo` is a stand-in that knows its decorators, unless it is imported already."""
    if _COMPILER in sys.modules:
        yield
        return
    standins = {_COMPILER: _Compiler(_COMPILER), _INDEXING: _Indexing(_INDEXING)}
    sys.modules.update(standins)
    parts = _Parts(standins.values())
    sys.meta_path.insert(0, parts)
    try:
        yield
    finally:
        sys.meta_path.remove(parts)
        _forget(standins.values())


class _Finder:
    """A meta-path finder of some modules of transformers: finds each the usual way, and shortens what it imports.

    It does not inherit from importlib.abc, whose import would cost every start 20 ms.
    """

    def __init__(self) -> None:
        self.left = {_AVAILABILITY, *_DECORATING}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.left:
            return None
        self.left.remove(fullname)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Loader", _Loader(spec.loader))
        return spec


class _Loader:
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with without_compiler():
            self.loader.exec_module(module)
        if module.__name__ == _AVAILABILITY:  # before the other modules take these functions from it
            for name in _ABSENT:
                if hasattr(module, name):
                    setattr(module, name, _absent)


def _absent() -> bool:
    return False


class _Parts:
    """A meta-path finder of what the compiler's package has besides: whoever imports that gets all of the real one."""

    def __init__(self, standins: Iterable[ModuleType]) -> None:
        self.standins = standins

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not (fullname.startswith(f"{_COMPILER}.") and isinstance(sys.modules.get(_COMPILER), _Compiler)):
            return None
        _forget(self.standins)
        spec = import_module(fullname).__spec__
        assert spec is not None
        spec.loader = cast("Loader", _Imported())
        return spec


class _Imported:
    """A loader of a module that is imported already."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Compiler(ModuleType):
    """`torch._dynamo` with the decorators in use; whoever asks for more gets the real module's."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # it is a package

    @staticmethod
    def disable(function: Callable[..., Any] | None = None, *settings: Any, **more: Any) -> Callable[..., Any]:
        """As of torch: a function that is not compiled, or a decorator where none is given."""
        if function is None:
            return lambda function: _once_loaded(function, "disable", *settings, **more)
        return _once_loaded(function, "disable", *settings, **more)

    @staticmethod
    def allow_in_graph(function: Callable[..., Any]) -> Callable[..., Any]:
        """As of torch: a function that compiled code calls and does not look into."""
        return _once_loaded(function, "allow_in_graph")

    @staticmethod
    def assume_constant_result(function: Callable[..., Any]) -> Callable[..., Any]:
        """As of torch: a function that compiled code calls once."""
        return _once_loaded(function, "assume_constant_result")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _forget(module for key in (_COMPILER, _INDEXING) if (module := sys.modules.get(key)) is not None)
        return getattr(import_module(_COMPILER), name)


class _Indexing(ModuleType):
    """The module of one class, which masks need that are made by `vmap`."""

    @staticmethod
    def TransformGetItemToIndex() -> Any:
        """An instance of the real class."""
        return import_module(_INDEXING).TransformGetItemToIndex()


def _forget(modules: Iterable[ModuleType]) -> None:
    """Take stand-ins out of `sys.modules`, so that the next import is the real one's."""
    for module in list(modules):
        if isinstance(module, _Compiler | _Indexing) and sys.modules.get(module.__name__) is module:
            del sys.modules[module.__name__]


def _once_loaded(function: Callable[..., Any], decorator: str, *settings: Any, **more: Any) -> Callable[..., Any]:
    """`function`, decorated by torch as soon as its compiler is there: nothing is compiled before."""
    decorated: Callable[..., Any] | None = None

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal decorated
        if decorated is None:
            compiler = sys.modules.get(_COMPILER)
            if not hasattr(compiler, "__file__"):  # none, or the stand-in
                return function(*args, **kwargs)
            decorated = getattr(compiler, decorator)(function, *settings, **more)
        return decorated(*args, **kwargs)

    return wrapper
