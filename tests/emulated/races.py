"""What the device still works on while the host goes ahead, and who touches it too early.

- The result of a collective that was begun with ``async_op`` is nobody's until somebody has waited for it;
  its operand must not be written.
- Memory of the host from which the device copies must not be written, and that into which it copies not be
  looked at, until the host has waited for the device.
"""

import functools
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

_BEGUN = (
    "all_reduce", "broadcast", "reduce", "all_gather_into_tensor", "_all_gather_base", "all_gather",
    "reduce_scatter_tensor", "_reduce_scatter_base", "reduce_scatter", "all_to_all_single",
)  # fmt: skip
"""Collectives whose first argument holds the result; the others are operands."""

# By storage: it, which so stays alive, and what is under way.
_Memory = dict[int, tuple[torch.UntypedStorage, str]]


class UnderWay:
    """Attributes: memory that must not be ``read`` or written, and that must not be ``written``, for the
    collectives; ``host_read`` and ``host_written`` likewise, until the host waits; ``pinned`` memory.
    """

    def __init__(self) -> None:
        self.read: _Memory = {}
        self.written: _Memory = {}
        self.host_read: _Memory = {}
        self.host_written: _Memory = {}
        self.pinned: _Memory = {}

    def __reduce__(self):
        """The memory stays in its process."""
        return UnderWay, ()

    def pin(self, tensor: Tensor) -> None:
        _add(self.pinned, [tensor], "pinned")

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.pinned

    def copies(self, memory: Tensor, *, to_device: bool) -> None:
        """An asynchronous copy has begun, from or into this memory of the host."""
        if to_device:
            _add(self.host_written, [memory], "memory from which the device still copies")
        else:
            _add(self.host_read, [memory], "memory into which the device still copies")

    def copies_to_host(self) -> list[int]:
        """The copies to the host that are under way, for :meth:`arrived`."""
        return list(self.host_read)

    def arrived(self, copies: list[int]) -> None:
        """Somebody has waited for these copies to the host, and for nothing else."""
        for key in copies:
            self.host_read.pop(key, None)

    def waited(self) -> None:
        """The host has waited for the device."""
        self.host_read.clear()
        self.host_written.clear()

    def fault(self, function, args: tuple, kwargs: dict) -> str | None:
        """What ``function`` of these arguments would touch too early."""
        if not (self.read or self.written or self.host_read or self.host_written) or _is_view(function):
            return None
        given = list(_tensors(function, args, kwargs))
        # What the device itself does with the host's memory comes one after the other.
        by_device = len({tensor.device.type for tensor, _ in given}) > 1 or kwargs.get("device") is not None
        for tensor, is_written in given:
            key = tensor.untyped_storage()._cdata
            found = self.read.get(key) or (is_written and self.written.get(key))
            if not found and not by_device:
                found = self.host_read.get(key) or (is_written and self.host_written.get(key))
            if found:
                return found[1]
        return None


class _Begun:
    """A collective's work, until somebody waits for it."""

    def __init__(self, work, under_way: UnderWay, results: list[Tensor], operands: list[Tensor], what: str):
        self._work, self._under_way = work, under_way
        self._keys = [t.untyped_storage()._cdata for t in (*results, *operands)]
        _add(under_way.read, results, f"the result of {what} before anybody has waited for it")
        _add(under_way.written, operands, f"the operand of {what}, which is still read")

    def wait(self, *args, **kwargs):
        for key in self._keys:
            self._under_way.read.pop(key, None)
            self._under_way.written.pop(key, None)
        return self._work.wait(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._work, name)


def watch_collectives(under_way: Callable[[], UnderWay | None]) -> None:
    """Have the works that ``torch.distributed`` returns say when they are waited for.

    ``under_way``: asked at each collective; None leaves it alone.
    """
    for name in _BEGUN:
        watched = _watched(getattr(dist, name), name, under_way)
        for module in (dist, dist.distributed_c10d):
            setattr(module, name, watched)


def _watched(function, name: str, under_way: Callable[[], UnderWay | None]):
    @functools.wraps(function)
    def begin(*args, **kwargs):
        work = function(*args, **kwargs)
        if work is None or not kwargs.get("async_op") or (watching := under_way()) is None:
            return work
        given = [*args, *(value for key, value in kwargs.items() if key not in ("group", "op"))]
        tensors = [[x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in (given[:1], given[1:])]
        return _Begun(work, watching, *tensors, name)

    return begin


def _add(memory: _Memory, tensors: Iterable[Tensor], what: str) -> None:
    for tensor in tensors:
        storage = tensor.untyped_storage()
        memory[storage._cdata] = (storage, what)


def _tensors(function, args: tuple, kwargs: dict):
    """The tensors that are given, each with whether it is written."""
    written = _written_arguments(function)
    for position, argument in enumerate(args):
        for leaf in tree_leaves(argument):
            if isinstance(leaf, Tensor):
                yield leaf, position in written
    for name, argument in kwargs.items():
        for leaf in tree_leaves(argument):
            if isinstance(leaf, Tensor):
                yield leaf, name in written


@functools.cache
def _written_arguments(function) -> frozenset:
    found = set()
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found |= {position, argument.name}
    return frozenset(found)


@functools.cache
def _is_view(function) -> bool:
    """Whether it makes another tensor of the same memory, and touches nothing of it."""
    returns = function._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
