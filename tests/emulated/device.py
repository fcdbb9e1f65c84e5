"""A GPU machine that is not there, on a CPU: its device, its process groups, and one process of a job on it.

Tensors have shapes, types and a device but no values (torch's FakeTensorMode on its spare device type, here
named ``gpu``); torch's ``fake`` process groups accept every collective and send nothing. What runs is the
project's code, Megatron's and DeepSpeed's, as a GPU would have them run it, under ``rules.py``.

Limits: constants stand for values, so of each branch on a value one side is seen (a norm is finite, no rank
asks for a stop). Object collectives, which carry Python values, give each rank its own. Nothing is learnt
of numerics, NCCL itself or speed; of memory the bytes of tensors (``memory.py``); of races those of
``races.py``. The device's own name is ``gpu``: code that names ``cuda`` would not reach it, and
``test_source.py`` lists all that does.

Everything is set for the whole process and never undone, so each call has a fork of its own.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import cpu_accelerator, set_accelerator
from deepspeed.runtime.zero import partitioned_param_coordinator
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from inrank_megatron.checkpoint.writing import Part
from inrank_megatron.distributed import platform
from inrank_megatron.distributed.launcher import Ranks
from inrank_megatron.distributed.process_groups import Parallel, initialise, shutdown
from inrank_megatron.distributed.rendezvous import Meeting
from inrank_megatron.distributed.roll import Arrival
from inrank_megatron.engine import decisions
from inrank_megatron.lowrank.linalg import cores, spectra
from inrank_megatron.training import saving
from tests.emulated.operators import Operators, install
from tests.emulated.races import watch_collectives
from tests.emulated.rules import NAME, Collective, Log, Rules, check_operation, refuse
from tests.emulated.streams import Event, Stream, Streams
from tests.forked import server

ZERO_AT = {
    "inrank_megatron.engine.step_report:fetch",
    "inrank_megatron.distributed.process_groups:largest",
    "inrank_megatron.generation.generate:check",
}
"""Where a 1 that is read would be a request to stop, or a number that is none."""


_PLATFORM = {
    "device": (platform.device, lambda: device()),
    "backend": (platform.backend, lambda: "fake"),
    "device_name": (platform.device_name, lambda: "GPU"),
}


class EmulationError(AssertionError):
    """The function raised, on the emulated device; the message holds its traceback."""


def run_emulated(function: Callable, *args: Any, timeout: float = 120) -> Any:
    """``function(*args)`` in a process that sees the device; a top-level function of an importable module,
    whose result survives a pipe.
    """
    here, there = server().Pipe()
    process = server().Process(target=_serve, args=(there, function, args), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(timeout):
            raise EmulationError(f"{function.__name__}: no answer in {timeout:g} s")
        succeeded, answer = here.recv()
    except EOFError:
        process.join(5)
        raise EmulationError(f"{function.__name__} died, exit code {process.exitcode}") from None
    finally:
        process.kill()
    if not succeeded:
        raise EmulationError(answer)
    return answer


def device() -> torch.device:
    """The emulated device."""
    return torch.device(NAME, 0)


@contextmanager
def rank_of(
    rank: int, world_size: int, tensor_parallel: int, *, store: dist.Store | None = None
) -> Iterator[tuple[Parallel, Log]]:
    """One rank of a job on emulated devices, and the log of what it does. ``store``: of the meeting."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  which registers the backend

    # Each is shown one device, as `srun --gpus-per-task 1` does it; here under Open MPI.
    os.environ["LOCAL_RANK"] = os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(rank)
    platform.take_device(platform.device_index(Ranks(rank, world_size, rank, world_size), 1))
    arrivals = [Arrival("host", "machine", 0, 0.0, world_size, "127.0.0.1", None, "")] * world_size
    meeting = Meeting(Ranks(rank, world_size, rank, world_size), store or dist.HashStore(), arrivals)
    log = Log(zero_at=ZERO_AT)
    rules = Rules(log)
    _LOGS[:] = [log]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), rules:
            parallel = initialise(backend="fake", tensor_model_parallel_size=tensor_parallel, meeting=meeting)
            rules.groups |= {
                parallel.dp_group.group_name: f"dp of {parallel.dp_size}",
                parallel.tp_group.group_name: f"tp of {parallel.tp_size}",
                dist.group.WORLD.group_name: f"world of {world_size}",
            }
            yield parallel, log
    finally:
        shutdown()


_LOGS: list[Log] = []
operators = Operators(lambda: _LOGS[-1].under_way)


def _serve(pipe: Connection, function: Callable, args: tuple) -> None:
    try:
        _install()
        pipe.send((True, function(*args)))
    except Exception:
        pipe.send((False, traceback.format_exc()))


def _install() -> None:
    """Make this process see the device."""
    _setup_privateuseone_for_python_backend(NAME)
    # It would ask the device's own guard for its index in each operation.
    fake_tensor._is_privateuse1_backend_available = lambda: False
    FakeTensor.data_ptr = lambda self: 0
    FakeTensorMode.avoid_device_init = True  # although CUDA seems to be there
    torch.autograd.set_multithreading_enabled(False)  # the dispatch mode is the thread's own
    cores.on_host_cores = lambda decompose, matrices: [decompose(matrix) for matrix in matrices]  # the same
    spectra.in_background = decisions.in_background = _in_background
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    torch.cuda.is_available = _is_visible
    torch.cuda.device_count = lambda: int(_is_visible())
    torch.cuda.set_device = lambda index: None
    torch.cuda.current_device = lambda: device() if _is_visible() else torch.device("cpu")
    torch.cuda.synchronize = _synchronise
    torch.cuda.is_current_stream_capturing = lambda: False  # a build with CUDA would ask the driver
    torch.cuda.empty_cache = _gives_memory_back
    torch.cuda.Event, torch.cuda.Stream, torch.cuda.stream = _NewEvent, _NewStream, _on_stream
    torch.cuda.current_stream, torch.cuda.default_stream = _current_stream, _default_stream
    Tensor.record_stream = lambda tensor, stream: _LOGS[-1].under_way.record(tensor, stream)
    torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = lambda: 0
    torch.cuda.reset_peak_memory_stats = lambda: None
    Tensor.pin_memory, Tensor.is_pinned = _pin, _is_pinned
    FakeTensor.__repr__ = _shown
    watch_collectives(lambda: _LOGS[-1].under_way)
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter"):
        checked = check_operation(getattr(dist, name))
        for module in (dist, dist.distributed_c10d):
            setattr(module, name, checked)
    nn.Module.to = _module_to
    set_accelerator(_Accelerator())
    install(operators)
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda *args, **kwargs: None
    Parallel.broadcast_from_rank_0 = _broadcast_from_rank_0
    Parallel.gather_from_all_ranks = _gather_from_all_ranks
    saving.PartWriter, saving.SideGroup, decisions.SideGroup = _Writer, _Side, _Side
    # Modules have the functions of platform.py as names of their own.
    for module in [module for name, module in sys.modules.items() if name.startswith("inrank_megatron")]:
        for name, (original, answer) in _PLATFORM.items():
            if getattr(module, name, None) is original:
                setattr(module, name, answer)


def _is_visible() -> bool:
    """As torch sees it before it has looked for the first time."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def _synchronise(*args, **kwargs) -> None:
    for log in _LOGS:
        log.under_way.streams.synchronize()


def _streams() -> Streams:
    return _LOGS[-1].under_way.streams


class _NewEvent:
    """A type, which annotations name; what it makes is of the device that is there."""

    def __new__(cls, *args, **kwargs):
        return Event(_streams())


class _NewStream:
    """As ``_NewEvent``."""

    def __new__(cls, *args, **kwargs):
        return _streams().make()


def _current_stream(*args) -> Stream:
    return _streams().current


def _default_stream(*args) -> Stream:
    return _streams().default


def _on_stream(stream: Stream | None):
    return _streams().entered(stream)


def _in_background(compute):
    """Of the other thread nobody takes note: the dispatch mode is the main thread's own. It runs at the last
    moment, when a thread that reads what training has changed meanwhile would see that.
    """

    def result():
        streams = _streams()
        streams.elsewhere = True
        try:
            return compute()
        finally:
            streams.elsewhere = False

    return result


def _gives_memory_back() -> None:
    """CUDA waits for the device before it frees memory."""
    for log in _LOGS:
        log.under_way.streams.synchronize("gives memory back")


def _pin(tensor: Tensor, *args, **kwargs) -> Tensor:
    """A copy in pinned memory, or the tensor itself where it is pinned."""
    if tensor.device.type == NAME:
        refuse("pins a tensor of the device")
    if not _is_pinned(tensor):
        tensor = tensor.clone()
        for log in _LOGS:
            log.under_way.pin(tensor)
    return tensor


def _is_pinned(tensor: Tensor, *args, **kwargs) -> bool:
    return any(log.under_way.is_pinned(tensor) for log in _LOGS)


def _shown(tensor: Tensor, **kwargs) -> str:
    """As a tensor that is printed."""
    if tensor.device.type == NAME:
        for log in _LOGS:
            log.wait("prints a tensor")
    return f"tensor({tuple(tensor.shape)}, {tensor.dtype}, {tensor.device})"


def _broadcast_from_rank_0(self, compute):
    """Every rank computes; what is meant for rank 0 alone depends on nothing that ranks do not share."""
    _exchanges("broadcast_object")
    return compute()


def _exchanges(name: str) -> None:
    """Objects travel in tensors of the device, and the host waits for them."""
    _LOGS[-1].collective(Collective(name, "world"))
    _LOGS[-1].wait(name)


def _gather_from_all_ranks(self, value):
    _exchanges("all_gather_object")
    return [value] * self.world_size


_to = nn.Module.to


def _module_to(self, *args, **kwargs):
    """As torch's, but the parameters are new ones with the attributes of the old: those of FakeTensorMode
    cannot change their device in place.
    """
    if not (args and isinstance(args[0], torch.device | str) and torch.device(args[0]).type == NAME):
        return _to(self, *args, **kwargs)
    new: dict[int, nn.Parameter] = {}
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != NAME:
                module._parameters[name] = new.setdefault(id(parameter), _moved(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device())
    return self


def _moved(parameter: nn.Parameter) -> nn.Parameter:
    result = nn.Parameter(torch.empty_like(parameter, device=device()), requires_grad=parameter.requires_grad)
    own = vars(result)
    for name, value in vars(parameter).items():
        if name not in own and name not in ("fake_device", "fake_mode", "constant"):
            setattr(result, name, value)
    return result


class _Writer:
    """Copies slices to the host and writes nothing: tensors without values cannot be in a file."""

    def __init__(self, root, step, *, part, deferred, host):
        self._path, self.deferred = root / f"step_{step:08d}", deferred

    def begin(self):
        pass

    def add(self, piece):
        piece.values.cpu()

    def close(self):
        return Part()

    def publish_documents(self, documents):
        return self._path


class _Side:
    """Threads of the other ranks do not exist."""

    def __init__(self, parallel):
        pass

    def to_first(self, value):
        return [value]

    def from_first(self, value):
        return value


class _Accelerator(cpu_accelerator.CPU_Accelerator):
    """What DeepSpeed asks of the device; its CUDA accelerator would ask CUDA."""

    def is_synchronized_device(self):
        return False

    resolves_data_dependency = handles_memory_backpressure = use_host_timers = is_synchronized_device

    def device_name(self, device_index=None):
        return NAME if device_index is None else f"{NAME}:{device_index}"

    def device(self, device_index=None):
        return device()

    def set_device(self, device_index):
        if device_index not in (0, device()):
            raise RuntimeError("CUDA error: invalid device ordinal")

    def current_device(self):
        return 0

    def current_device_name(self):
        return f"{NAME}:0"

    def on_accelerator(self, tensor):
        return tensor.device.type == NAME

    def is_available(self):
        return True

    def synchronize(self, device_index=None):
        _synchronise()

    def available_memory(self, device_index=None):
        return 2**40

    def pin_memory(self, tensor, align_bytes=1):
        return _pin(tensor)

    def is_pinned(self, tensor):
        return _is_pinned(tensor)

    def supported_dtypes(self):
        return [torch.float32, torch.float16, torch.bfloat16]

    Stream, Event, stream = _NewStream, _NewEvent, staticmethod(_on_stream)
    current_stream, default_stream = staticmethod(_current_stream), staticmethod(_default_stream)
    IntTensor = property(lambda self: partial(torch.tensor, dtype=torch.int32, device=device()))
    ByteTensor = property(lambda self: partial(torch.tensor, dtype=torch.uint8, device=device()))
    FloatTensor = property(lambda self: partial(torch.tensor, dtype=torch.float32, device=device()))
