"""Imports of modules without what they would import with them and a run does not need."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch


def is_imported(module: str) -> bool:
    return module in sys.modules


def import_without_compiler(module: str) -> None:
    """Import ``module``, whose ``torch.compile`` gives every function back as it is.

    The compiler's back end, which the first call of ``torch.compile`` imports, is a third of what the imports
    of a run's process cost.
    """
    compiler, torch.compile = torch.compile, _leave
    try:
        importlib.import_module(module)
    finally:
        torch.compile = compiler


@contextmanager
def left_out(package: str) -> Iterator[None]:
    """An import of ``package`` fails, as where it is not installed; who has imported it before keeps it."""
    finder = _Failing(package)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Failing(MetaPathFinder, Loader):
    """Finds ``package``, for those who only ask whether it is there, and fails to load it."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == self._package else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        raise ModuleNotFoundError(f"{spec.name} is not imported here", name=spec.name)


def _leave(model: object = None, **options: object) -> object:
    """As :func:`torch.compile`, also as a decorator with options."""
    return (lambda function: function) if model is None else model
