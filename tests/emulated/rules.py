"""What CUDA and NCCL ask of every operation, held against it as it is dispatched. See ``device.py``.

- A collective takes tensors of the device alone, contiguous, of one type that NCCL carries, and of sizes
  that fit; it sums or compares, and knows no bitwise operation.
- An operation takes tensors of one device (FakeTensorMode's own rule).
- In deterministic mode, no operation that torch refuses on CUDA then, or that adds with atomics.
- A generator of random numbers is of the device on which they are drawn.
- Nothing is touched on which something else still works (``races.py``), on whatever stream (``streams.py``).
- In half precision, rows of matrices begin at multiples of 16 bytes; other products are noted, and those of
  matrices in FP32.
- Whatever makes the host wait for the device is noted with its place: a value that is read, a copy between
  host and device that is not asynchronous or not from pinned memory, a shape that depends on values, a
  synchronisation.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.emulated.races import NAME, UnderWay
from tests.emulated.streams import Streams

NCCL_TYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8,
    torch.uint8, torch.bool,
}  # fmt: skip
BITWISE = ("BAND", "BOR", "BXOR")
PACKAGES = ("inrank_megatron", "deepspeed", "megatron", "transformers", "tests")
# A shape or a branch of these depends on values, or they look at a status that the device has computed
# (cholesky_ex leaves it to its caller, on the device; what cuSOLVER itself waits for is not known here).
ASKS = (
    "nonzero", "masked_select", "unique", "equal", "linalg_eigh", "linalg_svd", "kthvalue",
)  # fmt: skip
# With floating-point numbers. Their CPU kernels are others, and FakeTensorMode runs none.
NOT_REPEATABLE = (
    "kthvalue", "cumsum", "histc", "bincount", "median", "put_", "nll_loss_forward", "nll_loss2d_forward",
    "embedding_dense_backward", "embedding_bag", "_scaled_dot_product_cudnn_attention",
)  # fmt: skip
TILE = 8
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_")
_SHARED = ("_allgather_base_", "_reduce_scatter_base_")
_INDEXED = ("index", "index_put_", "_index_put_impl_", "index_put")
_COPIES = ("_to_copy", "copy_")
_HERE = Path(__file__).parent
_OWN = {_HERE / name for name in ("rules.py", "device.py", "races.py", "streams.py", "operators.py")}
_OWN.add(_HERE.parent / "allocations.py")


class BrokenRule(AssertionError):
    """What CUDA or NCCL would refuse."""


@dataclass(frozen=True)
class Wait:
    """A point where the host waits for the device.

    Args:
        place: ``module:function`` of the innermost line of the project, DeepSpeed or Megatron.
        line: its number. what: the operation.
    """

    place: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.place} (line {self.line}): {self.what}"


@dataclass(frozen=True)
class Collective:
    """``group``: ``world``, ``tp`` or ``dp`` with the number of its ranks."""

    name: str
    group: str
    tensors: tuple[tuple[tuple[int, ...], str], ...] = ()


@dataclass
class Log:
    """What has happened, by the phase that was set when it did."""

    phase: str = "start"
    waits: dict[str, list[Wait]] = field(default_factory=dict)
    collectives: dict[str, list[Collective]] = field(default_factory=dict)
    misaligned: dict[str, list[str]] = field(default_factory=dict)
    """Products in half precision of matrices with a size, or with rows so far apart, that leaves a TILE."""
    wide: dict[str, list[str]] = field(default_factory=dict)
    """Products in FP32."""
    products: set[str] = field(default_factory=set)
    """Devices on which matrices were multiplied."""
    under_way: UnderWay = field(init=False)
    races: list[str] = field(default_factory=list)
    """Of the backward pass, until it has ended."""
    zero_at: set[str] = field(default_factory=set)
    """Places at which numbers read are 0."""
    answers: dict[str, list[bool]] = field(default_factory=dict)
    """By place, what is read there of the next questions."""

    def __post_init__(self) -> None:
        self.under_way = UnderWay(Streams(self.note))

    def wait(self, what: str) -> None:
        """The host waits for the current stream."""
        self.under_way.streams.current.synchronize(what)

    def note(self, what: str) -> None:
        """The host waits, for more or less."""
        place, line = place_now()
        self.waits.setdefault(self.phase, []).append(Wait(place, line, what))

    def collective(self, entry: Collective) -> None:
        self.collectives.setdefault(self.phase, []).append(entry)


class Rules(TorchDispatchMode):
    """Holds every operation against the rules and notes it in the log."""

    def __init__(self, log: Log):
        super().__init__()
        self.log = log
        self.groups: dict[str, str] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "prim":  # asks for a shape or a device
            return function(*args, **kwargs)
        if torch.is_inference_mode_enabled() and function._can_decompose():
            with self:  # elsewhere autograd has taken it apart
                return function.decompose(*args, **kwargs)
        name = function.name().partition("::")[2].partition(".")[0]
        what = self._named(name)
        result = self._dispatch(name, what, function, args, kwargs)
        self._race(name, "takes", self.log.under_way.made(result, what))
        return result

    def _race(self, name: str, does: str, fault: str | None) -> None:
        """Refuses, if there is a fault: from the backward pass after it, as an error in its hooks may end the
        process without a word.
        """
        if fault:
            place, line = place_now()
            self.log.races.append(f"{place} (line {line}): {name} {does} {fault}")
        if self.log.races and torch._C._current_graph_task_id() == -1:
            raise BrokenRule(self.log.races.pop(0))

    def _named(self, name: str) -> str:
        """With its place, which takes time to find, where it is not on the default stream."""
        streams = self.log.under_way.streams
        return name if streams.current is streams.default else f"{name} in {place_now()[0]}"

    def _dispatch(self, name: str, what: str, function, args, kwargs):
        if name in NOT_REPEATABLE and torch.are_deterministic_algorithms_enabled() and _is_number(args[0]):
            refuse(f"{name} in deterministic mode")
        _check_generator(name, args, kwargs)
        if function.namespace == "c10d":
            self._collective(name, function, args, kwargs)
            return function(*args, **kwargs)
        fault = self.log.under_way.fault(function, args, kwargs, what, copies=name in _COPIES)
        self._race(name, "touches", fault)
        if name in ("_local_scalar_dense", "item"):  # the latter in inference mode
            return self._value(args[0])
        elif name == "index" and _is_mask(args[1]):
            if _on_device(args[0]):
                self.log.wait("chooses by a mask")
            return _masked(*args[:2])
        elif name in _INDEXED and _on_device(args[0]) and any(_of_the_host(i) for i in args[1]):
            self.log.wait("copies an index from the host")
        elif name in ("index_put_", "_index_put_impl_") and _is_mask(args[1]):
            # CUDA fills with one number under the mask; of several it must know how many.
            if _on_device(args[0]) and args[2].numel() > 1:
                self.log.wait("writes where a mask says")
            return args[0]
        elif name in _COPIES:
            return self._copy(name, function, args, kwargs)
        elif name in _PRODUCTS:
            self.log.products.add(args[0].device.type)
            if _on_device(args[0]):
                self._product(args[-2:])
        elif name.lstrip("_") in ASKS and _on_device(args[0]):
            self.log.wait(name)
        return function(*args, **kwargs)

    def _collective(self, name: str, function, args, kwargs) -> None:
        if name == "barrier":  # torch gives it a tensor of its own
            self.log.wait(name)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and name != "barrier"]
        for tensor in tensors:
            fault = None
            if not _on_device(tensor):
                fault = f"a tensor on the {tensor.device.type}"
            elif not tensor.is_contiguous():
                fault = f"strides {tensor.stride()}: not contiguous"
            elif tensor.dtype not in NCCL_TYPES:
                fault = f"{tensor.dtype}, which NCCL does not carry"
            if fault:
                refuse(f"{name} of {fault}")
        if len(types := {tensor.dtype for tensor in tensors}) > 1:
            refuse(f"{name} of {' and '.join(sorted(map(str, types)))}: NCCL carries one type")
        if name in _SHARED:
            sizes, ranks = [tensor.numel() for tensor in tensors], dist.ProcessGroup.unbox(args[2]).size()
            if max(sizes) != min(sizes) * ranks:
                refuse(f"{name} of {sizes[1]} elements into {sizes[0]} in a group of {ranks}")
        self._on_its_stream(name, function, args, kwargs)
        seen = tuple((tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors)
        self.log.collective(Collective(name, self._group(args), seen))

    def _on_its_stream(self, name: str, function, args, kwargs) -> None:
        """Its first argument holds the result, the others operands."""
        names = [argument.name for argument in function._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = [[x for x in tree_leaves(g) if isinstance(x, Tensor)] for g in (args[:1], args[1:])]
        begun_in = (
            dist.ProcessGroup.unbox(given["process_group"]).group_name
            if given.get("async_op", True)
            else None
        )
        fault = self.log.under_way.collective(*tensors, self._named(name), begun_in)
        self._race(name, "touches", fault)

    def _group(self, args) -> str:
        for argument in args:
            with contextlib.suppress(Exception):
                group = dist.ProcessGroup.unbox(argument)
                return self.groups.get(group.group_name, f"{group.size()} ranks")
        return "unknown"

    def _value(self, tensor: Tensor) -> float | int | bool:
        if _on_device(tensor):
            self.log.wait(f"reads a {tensor.dtype}")
        place, _ = place_now()
        if tensor.dtype == torch.bool and self.log.answers.get(place):
            return self.log.answers[place].pop(0)
        if place in self.log.zero_at:
            return 0.0
        if tensor.dtype in (torch.bool, torch.uint8):
            return not place.startswith("deepspeed.")  # which asks for overflows
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _product(self, matrices: tuple[Tensor, Tensor]) -> None:
        for matrix in matrices:
            distance = max(matrix.stride()[-2:])  # rows, or columns of a transposed matrix
            if matrix.dtype == torch.float32 and matrix.dim() == 2:
                place, line = place_now()
                self.log.wide.setdefault(self.log.phase, []).append(f"{place} (line {line})")
            if matrix.itemsize == 2 and any(size % TILE for size in (*matrix.shape[-2:], distance)):
                place, line = place_now()
                shapes = " x ".join(f"{tuple(m.shape)} of strides {m.stride()}" for m in matrices)
                self.log.misaligned.setdefault(self.log.phase, []).append(f"{place} (line {line}): {shapes}")

    def _copy(self, name: str, function, args, kwargs) -> Tensor:
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
        if {source.device.type, target.type} != {"cpu", NAME}:
            return function(*args, **kwargs)
        asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        under_way, to_device = self.log.under_way, target.type == NAME
        if not asynchronous:
            self.log.wait(f"copies {source.device.type} -> {target.type}, and not asynchronously")
        elif to_device and not under_way.is_pinned(source):
            self.log.wait("copies from pageable memory")
        result = function(*args, **kwargs)
        if asynchronous and not to_device:
            under_way.arrives(result, name)
        return result


def refuse(what: str) -> NoReturn:
    """Raises BrokenRule, with the place."""
    place, line = place_now()
    raise BrokenRule(f"{place} (line {line}): {what}")


def check_operation(function: Callable) -> Callable:
    """``function``, a collective of ``torch.distributed``, which refuses the operations that NCCL lacks."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, dist.ReduceOp.RedOpType) and value.name in BITWISE:
                refuse(f"{function.__name__} with {value.name}, which NCCL does not have")
        return function(*args, **kwargs)

    return checked


def _check_generator(name: str, args, kwargs) -> None:
    if (generator := kwargs.get("generator")) is not None:
        drawn_on = kwargs.get("device") or next((x.device for x in args if isinstance(x, Tensor)), "cpu")
        if torch.device(drawn_on).type != generator.device.type:
            refuse(f"{name} on {drawn_on} with a generator of the {generator.device.type}")


def _of_the_host(index: Any) -> bool:
    return isinstance(index, Tensor) and index.device.type == "cpu" and index.dim() > 0


def _on_device(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == NAME


def _is_number(tensor: Any) -> bool:
    return _on_device(tensor) and tensor.dtype.is_floating_point


def _is_mask(indices) -> bool:
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _masked(tensor: Tensor, indices) -> Tensor:
    """As if every entry were chosen."""
    mask = next(i for i in indices if isinstance(i, Tensor))
    return tensor.reshape(mask.numel(), *tensor.shape[mask.dim() :])


def place_now() -> tuple[str, int]:
    """Module and function, and line, of the innermost frame that is not torch's or this package's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if module := _module(frame.f_code.co_filename):
            return f"{module}:{frame.f_code.co_name}", frame.f_lineno
        frame = frame.f_back
    return "unknown", 0


@functools.cache
def _module(filename: str) -> str | None:
    """The module of a source file of the packages that are looked at."""
    path = Path(filename)
    if path in _OWN:
        return None
    parts = path.with_suffix("").parts
    for package in PACKAGES:
        if package in parts[:-1]:
            return ".".join(parts[len(parts) - 1 - parts[::-1].index(package) :])
    return None
