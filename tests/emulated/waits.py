"""Steps in which streams of the device do not wait for each other; functions that ``run_emulated`` calls."""

import sys
import traceback

import torch

from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
from tests.contract.cases import ACCUMULATION
from tests.contract.layouts import LAYOUTS
from tests.contract.sessions import PADDED, configuration
from tests.emulated.device import device, rank_of
from tests.emulated.faults import one_layer
from tests.emulated.streams import Stream, Streams

STEPS = 2


def without(stage: int, places: list[str | None]) -> dict[str | None, tuple[str, dict[str, int]]]:
    """Two steps of a ZeRO stage for each place, ``module:function``, in which no wait for a stream
    happens, and no allocator learns of one: what that raised, and how much work each stream was given.
    """
    return {place: _steps(stage, place) for place in places}


def _steps(stage: int, place: str | None) -> tuple[str, dict[str, int]]:
    originals = {(kind, name): getattr(kind, name) for kind, name in _WAITS}
    for (kind, name), original in originals.items():
        setattr(kind, name, _left_out(original, place))
    try:
        return _trained(stage)
    finally:
        for (kind, name), original in originals.items():
            setattr(kind, name, original)


_WAITS = (
    (Stream, "wait_stream"),
    (Stream, "synchronize"),
    (Streams, "synchronize"),
    (torch.Tensor, "record_stream"),
)


def _left_out(wait, place: str | None):
    return lambda *args: None if _caller() == place else wait(*args)


def _caller() -> str:
    """The innermost function that is not of these tests."""
    frame = sys._getframe(1)
    while (module := frame.f_globals["__name__"]).startswith("tests."):
        frame = frame.f_back
    return f"{module}:{frame.f_code.co_name}"


def _trained(stage: int) -> tuple[str, dict[str, int]]:
    layout = LAYOUTS["DP2"]
    with rank_of(0, layout.world_size, layout.tensor_parallel) as (parallel, log):
        config = configuration("inrank", layout, num_layers=1, bf16=True, zero_stage=stage)
        # Several buckets, as in a large model, and of ZeRO 3 no parameter that stays gathered.
        zero = {
            "reduce_bucket_size": PADDED * config.model.hidden_size,
            "stage3_param_persistence_threshold": 0,
        }
        engine = one_layer(config, parallel, {"zero_optimization": zero})
        tokens, message = torch.zeros(2, 32, dtype=torch.int64, device=device()), ""
        try:
            for step in range(1, STEPS + 1):
                engine.train_step([(tokens, tokens)] * ACCUMULATION, step=step, lr=1e-3)
        except AssertionError as error:
            message = "".join(traceback.format_exception_only(error))
        stop_deepspeed(engine.deepspeed)
        return message, log.under_way.streams.work()
