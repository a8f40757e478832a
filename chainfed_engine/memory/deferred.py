"""Imports that wait until they are used: what transformers' modelling code imports and a run never calls.

A model class brings in optimisers of SciPy, symbolic algebra, torch's compiler and its distributed tensors: 110 MiB for
names that stand in branches other than ours. Inside `deferred_imports` these packages are stood in for by empty
modules, and each name taken from one by a `Deferred`, which imports the real thing when it is called, read or
inherited from. Outside the block every import is the ordinary one.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from threading import RLock
from types import ModuleType
from typing import Any, Union

PACKAGES = (
    "accelerate",
    "scipy",
    "sympy",
    "torch._dynamo",
    "torch.distributed._composable",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    # These make objects of distributed tensors at their own import.
    "transformers.distributed.expert_parallel",
    "transformers.distributed.tensor_parallel",
)
_lock = RLock()


@contextmanager
def deferred_imports(packages: Sequence[str] = PACKAGES) -> Iterator[None]:
    """Within the block, `import` and `from ... import` of these packages and their modules import nothing yet. A
    package that is already there stays as it is."""
    with _lock:
        finder = _Finder([name for name in packages if name not in sys.modules])
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            _forget_stand_ins()


class Deferred:
    """`name` of a module that is imported when this is called, read, compared by `isinstance` or inherited from.

    `isinstance` asks without importing: nothing can be an instance of a class whose package is not there."""

    def __init__(self, module: str, name: str) -> None:
        self.__dict__.update(_module=module, _name=name)

    def _real(self) -> Any:
        return getattr(_real_module(self._module), self._name)

    def _real_if_there(self) -> Any:
        module = sys.modules.get(self._module)
        return None if module is None or isinstance(module, _StandIn) else getattr(module, self._name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._real()(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # what inspection asks of any object
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __getitem__(self, key: Any) -> Any:
        return self._real()[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._real()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._real())

    def __len__(self) -> int:
        return len(self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __instancecheck__(self, instance: object) -> bool:
        real = self._real_if_there()
        return real is not None and isinstance(instance, real)

    def __subclasscheck__(self, subclass: type) -> bool:
        real = self._real_if_there()
        return real is not None and issubclass(subclass, real)

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007 (a value, not an annotation)

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007

    def __repr__(self) -> str:
        return f"<{self._module}.{self._name}, imported when it is used>"


class _StandIn(ModuleType):
    """An empty package; a module that has bound it by `import package` reaches the real one through it afterwards."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            if self.__name__ == _COMPILER and name in _DECORATORS:
                return _DECORATORS[name]
            return Deferred(self.__name__, name)
        return getattr(_real_module(self.__name__), name)


class _Finder(MetaPathFinder, Loader):
    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name in self._packages:
            return ModuleSpec(name, self, is_package=True) if _is_there(name, path) else None
        if any(name.startswith(package + ".") for package in self._packages):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _is_there(name: str, path: Any) -> bool:
    """Whether the package is installed: libraries ask for it and go without it where it is not."""
    others = (finder for finder in sys.meta_path if not isinstance(finder, _Finder))
    return any(finder.find_spec(name, path) is not None for finder in others)


def _real_module(name: str) -> ModuleType:
    """The module itself, imported with no stand-in in the way, inside a `deferred_imports` block too."""
    with _lock:
        finders = [finder for finder in sys.meta_path if isinstance(finder, _Finder)]
        for finder in finders:
            sys.meta_path.remove(finder)
        try:
            _forget_stand_ins()
            return import_module(name)
        finally:
            sys.meta_path[:0] = finders


def _forget_stand_ins() -> None:
    for name, module in list(sys.modules.items()):
        if isinstance(module, _StandIn):
            del sys.modules[name]
            package, _, last = name.rpartition(".")
            if vars(sys.modules.get(package, module)).get(last) is module:
                delattr(sys.modules[package], last)


def uncompiled(function: Callable[..., Any], *arguments: Any, **named: Any) -> Callable[..., Any]:
    """What `torch._dynamo.disable(function, ...)` gives, without importing the compiler: as long as nothing else has
    imported it, nothing compiles, and the function runs as it is."""
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def run(*values: Any, **options: Any) -> Any:
        compiler = sys.modules.get(_COMPILER)
        if compiler is None or isinstance(compiler, _StandIn):
            return function(*values, **options)
        if not disabled:
            disabled.append(compiler.disable(function, *arguments, **named))
        return disabled[0](*values, **options)

    return run


def _disable(function: Callable[..., Any] | None = None, *arguments: Any, **named: Any) -> Any:
    if function is None:
        return lambda later: uncompiled(later, *arguments, **named)
    return uncompiled(function, *arguments, **named)


class _MarkLater(MetaPathFinder):
    """Marks of functions for the compiler, kept until it is imported: they mean nothing before."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any]] = []

    def decorator(self, name: str) -> Callable[[Any], Any]:
        def mark(function: Any) -> Any:
            self._marks.append((name, function))
            if self not in sys.meta_path:
                sys.meta_path.insert(0, self)
            return function

        return mark

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _COMPILER else None
        if spec is None or spec.loader is None:
            return None
        sys.meta_path.remove(self)
        execute = spec.loader.exec_module

        def execute_and_mark(module: ModuleType) -> None:
            execute(module)
            for mark, function in self._marks:
                getattr(module, mark)(function)

        spec.loader.exec_module = execute_and_mark  # type: ignore[method-assign]
        return spec


_COMPILER = "torch._dynamo"
_DECORATORS: dict[str, Callable[..., Any]] = {"disable": _disable}
_marks = _MarkLater()
_DECORATORS |= {name: _marks.decorator(name) for name in ("allow_in_graph", "assume_constant_result")}
