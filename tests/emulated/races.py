"""Memory that is touched while something else still works on it.

Whoever reads memory must come after the last write to it, and whoever writes after all reads and writes: on
the same stream, or after a wait (``streams.py``). That holds for

- work on two streams, a collective that was begun with ``async_op`` among them: NCCL does it on a stream of
  its own, for which the current one waits by ``wait`` of the work alone;
- the host and its memory from or into which the device copies asynchronously;
- memory of which nobody holds the tensor any more: what is allocated next on the stream of its allocation may
  take it, whatever other streams still do with it, unless ``record_stream`` has named them.

Memory is told apart to the byte, so that parts of a buffer may be worked on at once; the bytes between the
first and the last element of a tensor count as its own.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from tests.emulated.streams import Clock, Stream, Streams, merge

NAME = "gpu"
_GIVE_WORK = (
    "allreduce", "broadcast", "reduce", "_allgather_base", "allgather", "_reduce_scatter_base",
    "reduce_scatter", "alltoall_base", "alltoall", "all_gather_single", "all_gather_single_coalesced",
    "reduce_scatter_single", "reduce_scatter_single_coalesced", "allgather_into_tensor_coalesced",
    "reduce_scatter_tensor_coalesced", "allreduce_coalesced", "allgather_coalesced", "_end_coalescing",
)  # fmt: skip
_SWEEP = 4096  # allocations


@dataclass
class Access:
    """Of bytes ``low`` to ``high`` of a storage, by work ``number`` of ``stream``."""

    low: int
    high: int
    stream: Stream
    number: int
    is_write: bool
    what: str


@dataclass
class Memory:
    """A storage: the stream it was allocated on (None: of the host), and those that its allocator was told.

    ``accesses``: that somebody might still have to wait for.
    """

    reference: StorageWeakRef
    size: int
    allocated_on: Stream | None
    recorded: set[Stream] = field(default_factory=set)
    accesses: list[Access] = field(default_factory=list)


class UnderWay:
    """What is known of all memory. ``pinned``: storages of the host, which so stay alive."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.pinned: dict[int, torch.UntypedStorage] = {}
        self._memory: dict[int, Memory] = {}
        self._foreign: dict[int, Memory] = {}
        """Touched on another stream than their own."""
        self._allocations = 0
        self.begun: Clock = {}
        """When the collective that was called last is done; nothing where the current stream does it."""

    def __reduce__(self):
        """The memory stays in its process."""
        return UnderWay, (Streams(print),)

    def pin(self, tensor: Tensor) -> None:
        self.pinned[tensor.untyped_storage()._cdata] = tensor.untyped_storage()

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.pinned

    def record(self, tensor: Tensor, stream: Stream) -> None:
        """``record_stream``."""
        self._of(tensor).recorded.add(stream)

    def fault(self, function, args: tuple, kwargs: dict, what: str, *, copies: bool) -> str | None:
        """What ``function`` of these arguments touches too early; only one that ``copies`` has the device
        touch memory of the host: another takes a number from there as it is given out.
        """
        if _is_view(function):
            return None
        given = list(_tensors(function, args, kwargs))
        of_device = [(tensor, written) for tensor, written in given if tensor.device.type == NAME]
        device = kwargs.get("device")
        if not of_device and not (device and torch.device(device).type == NAME):
            return self.on_host(given)
        if copies:
            return self.on_stream(self.streams.current, given, what)
        of_host = [(tensor, written) for tensor, written in given if tensor.device.type != NAME]
        return self.on_host(of_host) or self.on_stream(self.streams.current, of_device, what)

    def arrives(self, copy: Tensor, what: str) -> None:
        """The current stream's last work writes this new memory of the host."""
        stream = self.streams.current
        if copy.numel():
            self._of(copy).accesses.append(Access(*_bytes(copy), stream, stream.given, True, what))

    def collective(self, results: list[Tensor], operands: list[Tensor], what: str, begun_in: str | None):
        """As :meth:`fault`. ``begun_in``: the name of the group, with ``async_op``."""
        current, given = (
            self.streams.current,
            [*((t, True) for t in results), *((t, False) for t in operands)],
        )
        self.begun = {}
        if begun_in is None:
            return self.on_stream(current, given, what)
        stream = self.streams.of_group(begun_in)
        stream.wait_stream(current)
        found = self.on_stream(stream, given, what)
        self.begun = stream.clock()
        return found

    def on_stream(self, stream: Stream, given: Iterable[tuple[Tensor, bool]], what: str) -> str | None:
        """Work ``what`` on ``stream``, which touches the tensors that are given, each with whether it is
        written.
        """
        number = stream.begin()
        for tensor, is_written in given:
            if tensor.numel():
                access = Access(*_bytes(tensor), stream, number, is_written, what)
                memory = self._of(tensor)
                if found := self._conflict(memory, access):
                    return found
                _note(memory, access)
                if memory.allocated_on not in (None, stream):
                    self._foreign[tensor.untyped_storage()._cdata] = memory
        return None

    def on_host(self, given: Iterable[tuple[Tensor, bool]]) -> str | None:
        """Work of the host on memory of its own, of which nobody takes note: it is done at once."""
        for tensor, is_written in given:
            memory = self._memory.get(tensor.untyped_storage()._cdata)
            if memory is None or memory.reference.expired() or not tensor.numel():
                continue
            low, high = _bytes(tensor)
            for other in memory.accesses:
                apart = other.high <= low or high <= other.low or not (is_written or other.is_write)
                if not apart and self.streams.host.get(other.stream, 0) < other.number:
                    return f"memory {'into' if other.is_write else 'from'} which the device still copies"
        return None

    def made(self, result: object, what: str) -> str | None:
        """``what`` has returned this: what it has allocated takes memory that is free, or is not."""
        for tensor in _leaves(result):
            if tensor.device.type != NAME:
                continue
            storage = tensor.untyped_storage()
            known = self._memory.get(storage._cdata)
            if known is None or known.reference.expired():
                if found := self._taken(storage.nbytes(), what):
                    return found
                memory = self._allocated(storage)
                stream = self.streams.current
                memory.accesses.append(Access(0, storage.nbytes(), stream, stream.given, True, what))
        return None

    def _conflict(self, memory: Memory, access: Access) -> str | None:
        for other in memory.accesses:
            if (
                (access.is_write or other.is_write)
                and other.low < access.high
                and access.low < other.high
                and not access.stream.knows(other.stream, other.number)
            ):
                does = "writes" if other.is_write else "reads"
                return (
                    f"on {access.stream.name} memory that {other.what} {does} on {other.stream.name}, "
                    "for which nothing has waited"
                )
        return None

    def _taken(self, size: int, what: str) -> str | None:
        """Memory that was given back too early, of at least ``size`` bytes, or less than a block."""
        stream = self.streams.current
        for key, memory in list(self._foreign.items()):
            if not memory.reference.expired() or memory.allocated_on is not stream:
                continue
            merge(stream.known, self.streams.host)
            # Of a recorded stream, all that came before the tensor was dropped: here, before now.
            early = [
                access
                for access in memory.accesses
                if not any(s.knows(access.stream, access.number) for s in (stream, *memory.recorded))
            ]
            if not early:
                del self._foreign[key]
            elif size <= max(memory.size, 512):
                return (
                    f"memory that was given back while {early[-1].what} uses it on {early[-1].stream.name}: "
                    "nothing has waited, and nobody has called record_stream"
                )
        return None

    def _of(self, tensor: Tensor) -> Memory:
        storage = tensor.untyped_storage()
        memory = self._memory.get(storage._cdata)
        if memory is None or memory.reference.expired():
            memory = self._allocated(storage, on_host=tensor.device.type != NAME)
        return memory

    def _allocated(self, storage: torch.UntypedStorage, *, on_host: bool = False) -> Memory:
        self._allocations += 1
        if self._allocations % _SWEEP == 0:
            self._memory = {key: m for key, m in self._memory.items() if not m.reference.expired()}
        memory = Memory(StorageWeakRef(storage), storage.nbytes(), None if on_host else self.streams.current)
        self._memory[storage._cdata] = memory
        return memory


class _Begun:
    """A collective's work. Its tensors stay alive until somebody waits for it, as NCCL's do."""

    def __init__(self, work, under_way: UnderWay, tensors: list[Tensor]):
        self._work, self._under_way, self._tensors = work, under_way, tensors
        self._clock = under_way.begun

    def wait(self, *args, **kwargs):
        merge(self._under_way.streams.current.known, self._clock)
        self._tensors = []
        return self._work.wait(*args, **kwargs)

    synchronize = wait

    def __getattr__(self, name):
        return getattr(self._work, name)


def watch_collectives(under_way: Callable[[], UnderWay]) -> None:
    """Have the works that process groups return say when they are waited for.

    ``under_way``: asked at each collective.
    """
    for name in _GIVE_WORK:
        if function := getattr(dist.ProcessGroup, name, None):
            setattr(dist.ProcessGroup, name, _watched(function, under_way))


def _watched(function, under_way: Callable[[], UnderWay]):
    @functools.wraps(function)
    def begin(group, *args, **kwargs):
        work = function(group, *args, **kwargs)
        return work and _Begun(work, under_way(), list(_leaves((args, kwargs))))

    return begin


def _note(memory: Memory, access: Access) -> None:
    """A write makes what was done before to the same bytes nobody's concern, and a read a former one on the
    same stream.
    """
    memory.accesses = [
        other
        for other in memory.accesses
        if other.low < access.low
        or other.high > access.high
        or not (access.is_write or (other.stream is access.stream and not other.is_write))
    ]
    memory.accesses.append(access)


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """First and last, and one more, of its storage."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset()
    return first * tensor.itemsize, (first + last + 1) * tensor.itemsize


def _leaves(tree: object) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _tensors(function, args: tuple, kwargs: dict):
    """The tensors that are given, each with whether it is written."""
    written = _written_arguments(function)
    for position, argument in enumerate(args):
        for leaf in _leaves(argument):
            yield leaf, position in written
    for name, argument in kwargs.items():
        for leaf in _leaves(argument):
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
