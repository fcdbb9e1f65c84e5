"""Whole trainings on the emulated device; top-level functions that ``run_emulated`` calls."""

import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.config.topology import topology_of
from inrank_megatron.data.batches import EvalWindows, TrainBatches
from inrank_megatron.distributed.marks import Marks
from inrank_megatron.distributed.platform import prepare_process
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine import decisions
from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.spectra import LayerSpectra
from inrank_megatron.engine.state import engine_record, load_engine, recorded_structure, stored_shapes
from inrank_megatron.lowrank.methods.registry import METHODS as REGISTRY
from inrank_megatron.lowrank.methods.registry import make_method
from inrank_megatron.model.gpt import GPTFactory
from inrank_megatron.training.loop import Trainer
from inrank_megatron.training.parts import OVERLAP
from inrank_megatron.training.run_logger import RunLogger
from tests.contract.checkpoints import Tensors
from tests.contract.layouts import LAYOUTS
from tests.contract.sessions import VOCABULARY, configuration
from tests.emulated.device import device, rank_of
from tests.emulated.rules import Collective, Log, Wait

STEPS, CHANGE = 4, 2
"""A check with what it leads to, and a switch or a restart, after step 2; at the end replicas are compared,
an evaluation and a checkpoint made.
"""
BEFORE, AFTER = "step 2", "step 4"
"""The second steps of either phase: what the first one of a structure does once is over."""


@dataclass(frozen=True)
class Seen:
    """What one rank did, by phase: ``start``, ``step n``, ``changes n``, ``between n``, ``resumed``."""

    waits: dict[str, list[Wait]]
    collectives: dict[str, list[Collective]]
    misaligned: dict[str, list[str]]
    wide: dict[str, list[str]]
    parts: tuple[str, ...]
    """Of which the run knows its peak memory."""
    left: list[str] | None


class Watched(Trainer):
    """Tells the log where the training is."""

    log: Log
    left: list[str] | None = None
    """After a switch: tensors of the first phase that something still holds."""

    def _step(self):
        self.log.phase = f"step {self.progress.step + 1}"
        return super()._step()

    def _change_ranks(self):
        self.log.phase = f"changes {self.progress.step}"
        model = weakref.ref(self.engine.model)
        held = [(name, weakref.ref(tensor)) for name, tensor in _held(self.engine)]
        super()._change_ranks()
        if self.engine.model is not model():
            self.left = [name for name, tensor in held if tensor() is not None]

    def _between_steps(self):
        self.log.phase = f"between {self.progress.step}"
        return super()._between_steps()


class Tokens:
    """A file of tokens that nobody has to write."""

    name, num_tokens, num_words = "tokens", 65, 10

    def tokens(self, start, count):
        return np.zeros(count, dtype=np.int64)


def training(rank: int, method: str, layout_name: str, settings: dict) -> Seen:
    """Train from the start to the end, then go on from tensors as the last checkpoint's, as ``rank`` of the
    job.
    """
    layout = LAYOUTS[layout_name]
    if settings.get("deterministic_mode"):
        prepare_process(deterministic=True)
    world = rank_of(rank, layout.world_size, layout.tensor_parallel)
    with world as (parallel, log), tempfile.TemporaryDirectory() as folder:
        config = configured(method, layout, settings)
        trainer = trainer_of(config, parallel, Path(folder))
        trainer.log = log
        assert trainer.train()
        record = engine_record(trainer.engine)
        saved = {n: torch.empty(shape) for n, shape in stored_shapes(trainer.engine).items()}
        stop_deepspeed(trainer.engine.deepspeed)
        log.phase = "resumed"
        if rank == 0:
            engine = _engine(config, parallel, recorded_structure(record))
            load_engine(engine, record, Tensors(saved))
            engine.train_step(trainer._micro_batches(0), step=STEPS + 1, lr=1e-3)
        return Seen(
            log.waits, log.collectives, log.misaligned, log.wide, tuple(trainer.peak_memory), trainer.left
        )


class Agreed(LayerSpectra):
    """Every layer is sound, and decomposed by this rank, whose values depend on nothing on the device."""

    ratio = 1.0  # of the smallest singular value over the largest

    def owned(self):
        values = np.geomspace(1, self.ratio, self._length)
        return {name: SimpleNamespace(numpy=lambda: values) for name in self._names}


def agreed_training(rank: int, ratio: float, *case) -> Seen:
    """As :func:`training`, with checks that the threads of the ranks decide among themselves."""
    decisions.LayerSpectra, Agreed.ratio = Agreed, ratio
    return training(rank, *case)


def _held(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Parameters, W0 and initial values, master weights and moments; all of them are new after a switch."""
    yield from engine.model.named_parameters()
    for name, pair in engine.initial.items():
        yield from ((f"initial {name}", tensor) for tensor in pair)
    optimizer = getattr(engine.deepspeed.optimizer, "optimizer", engine.deepspeed.optimizer)
    for master, state in optimizer.state.items():
        yield "master", master
        yield from ((f"moment {name}", value) for name, value in state.items() if isinstance(value, Tensor))


def configured(method, layout, settings) -> Config:
    return configuration(
        method,
        layout,
        num_layers=1,
        train_iters=STEPS,
        rank_check_interval=CHANGE,
        relora_interval=CHANGE,
        replica_check_interval=STEPS,
        rank_multiple_of=8,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        **settings,
    )


def trainer_of(config: Config, parallel: Parallel, folder: Path) -> Watched:
    topology = topology_of(config, world_size=parallel.world_size, vocab_size=VOCABULARY)
    by_step = REGISTRY[config.training.method].switches and config.inrank.switch_patience is None
    method = make_method(config, switch_step=CHANGE if by_step else None)
    batches = TrainBatches(
        [(Tokens(), 1.0)],
        seq_length=config.model.seq_length,
        global_batch_size=topology.global_batch_size,
        seed=config.training.seed,
    )
    structure = method.structure({name: min(shape) for name, shape in linear_shapes(config).items()})
    place = SimpleNamespace(
        path=folder, checkpoints=folder / "checkpoints", checkpoint=None, is_new=True, leaders=None
    )
    return Watched(
        config=config,
        topology=topology,
        engine=_engine(config, parallel, structure),
        method=method,
        batches=batches,
        windows={"valid": EvalWindows(Tokens(), seq_length=config.model.seq_length)},
        folder=place,
        run_logger=RunLogger(place, active=False, total_steps=STEPS, start_step=0, vocab_size=512),
        stop=SimpleNamespace(reason=lambda: None),
        identity={OVERLAP: True},
        peak_flops=None,
        marks=Marks(),
    )


def _engine(config: Config, parallel: Parallel, structure) -> Engine:
    topology = topology_of(config, world_size=parallel.world_size, vocab_size=VOCABULARY)
    factory = GPTFactory(
        config, parallel, vocab_size=topology.vocab_size, padded_vocab_size=topology.padded_vocab_size
    )
    return Engine(
        factory,
        structure,
        config=config,
        parallel=parallel,
        device=device(),
        accumulation=topology.accumulation_steps,
    )
