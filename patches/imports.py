"""Imports of modules that hand functions to the compiler of torch as they are imported."""

import importlib
import sys

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


def _leave(model: object = None, **options: object) -> object:
    """As :func:`torch.compile`, also as a decorator with options."""
    return (lambda function: function) if model is None else model
