"""What one rank of many does to save and to resume: bytes that it writes, sends and reads, and seconds.

Rank 0 of 4 tensor-parallel ranks x 16 replicas, of a dense model, by ZeRO stage; the other ranks do not
exist, so that one process measures. The limit of the bytes is the state (12 bytes per parameter: master and
two moments in FP32) over the ranks; of what ZeRO does not divide each replica reads all. Seconds are those of
the copy, for which training waits, and of the part on its way to this machine's temporary folder: written,
flushed and hashed.
"""

import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from inrank_megatron.benchmarks.blocks import DENSE, preset_config, rank_0_of
from inrank_megatron.benchmarks.collectives import count
from inrank_megatron.benchmarks.rows import Row
from inrank_megatron.benchmarks.step import GPT2_VOCABULARY, VOCABULARIES, training_step
from inrank_megatron.checkpoint.slices import Box
from inrank_megatron.checkpoint.writing import PartWriter
from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.held import fill_held, held_bytes, held_slices
from inrank_megatron.engine.state import stored_shapes

TENSOR_PARALLEL, REPLICAS = 4, 16
STAGES = (0, 1, 3)


def measure(preset: str) -> Iterator[Row]:
    """Rows for every ZeRO stage."""
    vocabulary = VOCABULARIES.get(preset, GPT2_VOCABULARY)
    for stage in STAGES:
        config = preset_config(preset, zero_stage=stage)
        with rank_0_of(TENSOR_PARALLEL, replicas=REPLICAS) as parallel:
            engine, _ = training_step(config, DENSE, parallel, vocabulary)
            yield from _rows(f"{preset} TP 4 x DP 16, ZeRO {stage}", engine)
            stop_deepspeed(engine.deepspeed)


def _rows(case: str, engine: Engine) -> Iterator[Row]:
    shapes = stored_shapes(engine)
    state = 4 * sum(math.prod(shape) for shape in shapes.values())
    with tempfile.TemporaryDirectory() as folder:
        writer = PartWriter(Path(folder), 1, part=0, deferred=True)
        writer.begin()
        sent = count(lambda: _copy(engine, writer))
        copying = _seconds(lambda: _copy(engine, PartWriter(Path(folder), 2, part=0, deferred=True)))
        writing = _seconds(writer.close)
    yield Row(case, "bytes a rank writes", held_bytes(engine), state / (TENSOR_PARALLEL * REPLICAS))
    yield Row(case, "bytes a rank sends", sum(c.sent * c.itemsize for c in sent), 0)
    yield Row(case, "seconds of the copy", copying)
    yield Row(case, "seconds of the writing", writing)
    readers = TENSOR_PARALLEL * (REPLICAS if engine.master_weights.shard_map.partitioned else 1)
    yield Row(case, "bytes a rank reads", _read(engine, shapes), state / readers)


def _read(engine: Engine, names: Collection[str]) -> int:
    """Bytes that this rank asks of a checkpoint. The values are lost."""
    asked = 0

    def read(name: str, box: Box) -> Tensor:
        nonlocal asked
        values = torch.zeros(box[1])
        asked += values.nbytes
        return values

    with torch.no_grad():
        fill_held(engine, read, names=names)
    return asked


def _copy(engine: Engine, writer: PartWriter) -> None:
    for piece in held_slices(engine):
        writer.add(piece)


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began
