"""Faults that somebody could write, and what the emulated device says of them.

Top-level functions that ``run_emulated`` calls; the assertions are in ``test_faults.py``.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from inrank_megatron.config.schema import Config
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
from inrank_megatron.engine.engine import Engine
from inrank_megatron.lowrank.layers import factorised
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.model.gpt import GPTFactory
from tests.contract.cases import ACCUMULATION
from tests.contract.layouts import LAYOUTS
from tests.contract.sessions import PADDED, VOCABULARY, configuration
from tests.emulated.device import device, operators, rank_of
from tests.emulated.rules import Collective, Log

LAYOUT = LAYOUTS["TP2 SP"]
shared_parallel: list[Parallel] = []


def in_the_forward_pass() -> dict[str, tuple[str, Log]]:
    """By fault: a step with it in the forward pass, what that raised, and the log."""
    return {name: _step(0, fault) for name, fault in FAULTS.items()}


def of_the_last_rank() -> list[Collective]:
    """Its collectives in a step in whose forward passes it calls one more."""
    return _step(1, _calls_one)[1].collectives["step 1"]


def one_layer(config: Config, parallel: Parallel, deepspeed_json: dict | None = None) -> Engine:
    """An engine whose factors have columns in use and others."""
    factory = GPTFactory(config, parallel, vocab_size=VOCABULARY, padded_vocab_size=PADDED)
    spec = FactorSpec(capacity=32, active_columns=10, rank=2)
    return Engine(
        factory,
        dict.fromkeys(factory.linear_shapes, spec),
        config=config,
        parallel=parallel,
        device=device(),
        accumulation=ACCUMULATION,
        deepspeed_json=deepspeed_json,
    )


def _step(rank: int, fault: Callable[[torch.Tensor], None]) -> tuple[str, Log]:
    with rank_of(rank, LAYOUT.world_size, LAYOUT.tensor_parallel) as (parallel, log):
        shared_parallel[:] = [parallel]
        engine = one_layer(configuration("inrank", LAYOUT, num_layers=1, bf16=True), parallel)
        hook = engine.model.decoder.register_forward_hook(lambda module, inputs, output: fault(output))
        tokens = torch.zeros(2, 32, dtype=torch.int64, device=device())
        log.phase, message = "step 1", ""
        try:
            engine.train_step([(tokens, tokens)] * ACCUMULATION, step=1, lr=1e-3)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        hook.remove()
        log.phase = "stopped"
        stop_deepspeed(engine.deepspeed)
        return message, log


def _nothing(hidden):
    pass


def _calls_one(hidden):
    dist.all_reduce(torch.zeros(1, device=device()))


def _reduces_on_the_host(hidden):
    dist.all_reduce(torch.zeros(1))


def _reduces_a_transposed_matrix(hidden):
    dist.all_reduce(torch.zeros(4, 6, device=device()).t())


def _reduces_short_integers(hidden):
    dist.all_reduce(torch.zeros(4, dtype=torch.int16, device=device()))


def _combines_bits(hidden):
    dist.all_reduce(torch.zeros(4, dtype=torch.int32, device=device()), op=dist.ReduceOp.BOR)


def _gathers_another_type(hidden):
    own, every = torch.zeros(2, device=device()), torch.zeros(4, dtype=torch.bfloat16, device=device())
    dist.all_gather_into_tensor(every, own, group=shared_parallel[-1].tp_group)  # here


def _gathers_into_too_little(hidden):
    own, every = torch.zeros(3, device=device()), torch.zeros(4, device=device())
    dist.all_gather_into_tensor(every, own, group=shared_parallel[-1].tp_group)  # here


def _gives_memory_back(hidden):
    torch.cuda.empty_cache()


def _mixes_devices(hidden):
    return hidden + torch.zeros(hidden.shape, dtype=hidden.dtype)


def _reads_a_value(hidden):
    if hidden.sum().item() > 1e9:
        raise ValueError("too large")


def _chooses_by_a_mask(hidden):
    hidden.detach()[hidden.detach() > 0].sum()


def _copies_a_number(hidden):
    hidden.detach() * torch.tensor(0.5, device=device())


def _copies_from_pageable_memory(hidden):
    torch.zeros(8).to(device(), non_blocking=True)


def _leaves_a_tile(hidden):
    factorised.TILE_BYTES = 2


def _multiplies_in_fp32(hidden):
    hidden.detach().flatten(0, 1).float() @ torch.zeros(64, 8, device=device())


def _picks_by_an_index_of_the_host(hidden):
    hidden.detach()[torch.arange(4)]


def _prints_a_tensor(hidden):
    print(f"shape {hidden.shape}, values {hidden.detach()!r:.0}")


def _agrees_on_an_object(hidden):
    shared_parallel[-1].broadcast_from_rank_0(lambda: 0)


def _uses_a_sum_before_it_is_there(hidden):
    total = torch.zeros(4, device=device())
    dist.all_reduce(total, async_op=True)
    total * 2  # here


def _writes_what_a_collective_still_reads(hidden):
    own, every = torch.zeros(2, device=device()), torch.zeros(4, device=device())
    work = dist.all_gather_into_tensor(every, own, group=shared_parallel[-1].tp_group, async_op=True)
    own.zero_()  # here
    work.wait()


def _fills_a_pinned_buffer_again(hidden):
    buffer = torch.zeros(8).pin_memory()
    buffer.to(device(), non_blocking=True)
    buffer.fill_(1.0)  # here


def _looks_at_a_copy_that_is_under_way(hidden):
    hidden.detach().to("cpu", non_blocking=True).sum()


def _reads_on_a_stream_that_has_not_waited(hidden):
    with torch.cuda.stream(torch.cuda.Stream()):
        hidden.detach().sum()  # here


def _writes_what_another_stream_reads(hidden):
    zeros, side = torch.zeros(4, device=device()), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        zeros.sum()
    zeros.add_(1)  # here


def _drops_what_another_stream_reads(hidden):
    zeros, side = torch.zeros(4, device=device()), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        zeros.sum()
    del zeros
    torch.zeros(4, device=device())  # here


def _has_streams_wait(hidden):
    """No fault: a stream waits for another and for an event, and an allocator knows. Halves of a buffer are
    apart.
    """
    buffer, side = torch.zeros(8, device=device()), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        buffer[:4].add_(1)
        read = torch.cuda.Event()
        read.record()
    buffer[4:].add_(1)
    torch.cuda.current_stream().wait_event(read)
    buffer.add_(1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        buffer.sum()
    buffer.record_stream(side)
    del buffer
    torch.zeros(8, device=device())


def _draws_with_a_generator_of_the_host(hidden):
    torch.rand(4, device=device(), generator=torch.Generator())


def _pins_what_is_on_the_device(hidden):
    hidden.detach().pin_memory()


def _updates_on_the_device_what_the_host_has(hidden):
    operators.multi_tensor_adam(2048, hidden.detach(), [[torch.zeros(4)]] * 4)  # here


def _updates_on_the_host_what_is_not_there_yet(hidden):
    gradient = hidden.detach().to("cpu", non_blocking=True)
    operators.adam_update(0, 1, 1e-3, gradient, gradient)  # here


FAULTS = {
    fault.__name__.strip("_"): fault
    for fault in (
        _nothing,
        _reduces_on_the_host,
        _reduces_a_transposed_matrix,
        _reduces_short_integers,
        _combines_bits,
        _gathers_another_type,
        _gathers_into_too_little,
        _mixes_devices,
        _reads_a_value,
        _gives_memory_back,
        _chooses_by_a_mask,
        _copies_a_number,
        _copies_from_pageable_memory,
        _leaves_a_tile,
        _multiplies_in_fp32,
        _picks_by_an_index_of_the_host,
        _prints_a_tensor,
        _agrees_on_an_object,
        _uses_a_sum_before_it_is_there,
        _writes_what_a_collective_still_reads,
        _fills_a_pinned_buffer_again,
        _looks_at_a_copy_that_is_under_way,
        _reads_on_a_stream_that_has_not_waited,
        _writes_what_another_stream_reads,
        _drops_what_another_stream_reads,
        _has_streams_wait,
        _draws_with_a_generator_of_the_host,
        _pins_what_is_on_the_device,
        _updates_on_the_device_what_the_host_has,
        _updates_on_the_host_what_is_not_there_yet,
    )
}
