"""What a run is made of, in this order: weights, data, method, model, engine, trainer. Collective."""

from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import Console

from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.config import costs
from inrank_megatron.config.devices import device_peak_flops
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.config.topology import Topology, topology_of
from inrank_megatron.data.batches import EvalWindows, TrainBatches
from inrank_megatron.data.cache import quiet
from inrank_megatron.data.prepare import PreparedData, prepare
from inrank_megatron.data.tokenizer import load_tokenizer
from inrank_megatron.distributed.platform import device, device_name
from inrank_megatron.engine.engine import Engine
from inrank_megatron.errors import UserError
from inrank_megatron.interop.start import fingerprint, is_other_program, start_weights
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.registry import make_method, switch_step
from inrank_megatron.model.gpt import GPTFactory
from inrank_megatron.model.pretrained import PretrainedWeights
from inrank_megatron.reporting.sinks.registry import open_sinks
from inrank_megatron.reporting.stages import shown
from inrank_megatron.training.job import Job
from inrank_megatron.training.loop import Trainer
from inrank_megatron.training.parts import OVERLAP
from inrank_megatron.training.pretrained import (
    check_tokenizer,
    choose_pretrained,
    read_pretrained,
    tokenizer_of,
)
from inrank_megatron.training.progress import Progress, resume_progress
from inrank_megatron.training.resuming import fill, identity_of, structure_of
from inrank_megatron.training.run_folder import RunFolder
from inrank_megatron.training.run_logger import RunLogger


def build(job: Job, folder: RunFolder) -> tuple[Trainer, PreparedData]:
    """The trainer of a run, at the step that its folder has come to, and its data."""
    checkpoint, pretrained = _open_weights(job, folder)
    data = _prepare_data(job, folder, checkpoint or pretrained)
    return _trainer(job, folder, data, pretrained=pretrained), data


def build_again(job: Job, folder: RunFolder, data: PreparedData, *, skipped_batches: int) -> Trainer:
    """The trainer of a run that goes back to the checkpoint open in its folder, passing over batches."""
    return _trainer(job, folder, data, pretrained=None, skipped_batches=skipped_batches)


def _open_weights(job: Job, folder: RunFolder) -> tuple[Checkpoint | None, PretrainedWeights | None]:
    """The checkpoint that the run continues, or the weights that it starts from, if any."""
    config, parallel = job.config, job.parallel
    if folder.opened is not None:
        return folder.opened, None
    if config.training.pretrained_checkpoint is None:
        return None, None
    source, notes = parallel.broadcast_from_rank_0_when_ready(
        lambda: choose_pretrained(config), job.meeting, "a verified pretrained checkpoint"
    )
    folder.notes.extend(notes)
    if is_other_program(config.training.pretrained_checkpoint):
        with suppress(UserError):  # which comes again
            start_weights(config.training.pretrained_checkpoint, config.training.pretrained_revision)
        job.meeting.wait_for_all("pretrained weights")  # each host may have to download them
    weights = parallel.call_or_raise_on_all_ranks(lambda: read_pretrained(source, config))
    content = parallel.call_or_raise_on_all_ranks(lambda: fingerprint(weights.folder))
    _check_equal(parallel.gather_from_all_ranks(content), "pretrained weights", "the same model")
    return None, weights


def _prepare_data(
    job: Job, folder: RunFolder, weights: Checkpoint | PretrainedWeights | None
) -> PreparedData:
    """The prepared text, of the same tokens as ``weights``."""
    config, parallel = job.config, job.parallel
    name, parses = config.data.tokenizer, config.data.parse_special_tokens
    own = weights.tokenizer if isinstance(weights, PretrainedWeights) else None
    own = tokenizer_of(weights.folder) if isinstance(weights, Checkpoint) else own
    if weights is not None and name is not None:  # before the text is read
        parallel.broadcast_from_rank_0(
            lambda: check_tokenizer(weights, load_tokenizer(name, parse_special_tokens=parses), own=own)
        )
    identity = weights.state.get("identity") if isinstance(weights, Checkpoint) else None
    recorded = identity["data"] if identity else None
    with shown(Console()) if parallel.rank == 0 else nullcontext(quiet) as progress:
        data = prepare(config.data, progress=progress, recorded=recorded)
    job.meeting.wait_for_all("data")  # nodes that each make their own may differ by more than a timeout
    _check_equal(parallel.gather_from_all_ranks(data.folder.name), "data", "the same files and tokenizer")
    folder.notes.extend(data.notes)
    if weights is not None:
        folder.notes.extend(
            parallel.broadcast_from_rank_0(lambda: check_tokenizer(weights, data.tokenizer, own=own))
        )
    return data


def _check_equal(keys: list[str], what: str, remedy: str) -> None:
    """Nodes without shared storage have their own copies."""
    other = next((rank for rank, key in enumerate(keys) if key != keys[0]), None)
    if other is not None:
        raise UserError(
            f"the {what} of rank {other} ({keys[other]}) are not those of rank 0 ({keys[0]}); give every "
            f"node {remedy}"
        )


def _trainer(
    job: Job,
    folder: RunFolder,
    data: PreparedData,
    *,
    pretrained: PretrainedWeights | None,
    skipped_batches: int | None = None,
) -> Trainer:
    """Batches, method, engine, trainer. ``skipped_batches``: after a rollback, more than the checkpoint's."""
    config, parallel, checkpoint = job.config, job.parallel, folder.opened
    vocab_size, world_size = data.tokenizer.vocab_size, parallel.world_size
    topology = topology_of(config, world_size=world_size, vocab_size=vocab_size)
    batches = TrainBatches(
        data.train,
        seq_length=config.model.seq_length,
        global_batch_size=topology.global_batch_size,
        seed=config.training.seed,
    )
    windows = {
        split: EvalWindows(file, seq_length=config.model.seq_length)
        for split, file in (("valid", data.valid), ("test", data.test))
        if file is not None
    }
    identity = _identity(config, data, checkpoint, steps_per_epoch=batches.steps_per_epoch)
    method = make_method(config, switch_step=identity["switch_step"])
    engine = _engine(job, folder, topology, method, pretrained=pretrained)
    progress = resume_progress(checkpoint) if checkpoint else Progress()
    if skipped_batches is not None:
        progress = replace(progress, history=replace(progress.history, skipped_batches=skipped_batches))
    run_logger = RunLogger(
        folder,
        active=parallel.rank == 0,
        total_steps=config.training.train_iters,
        start_step=progress.step,
        vocab_size=topology.vocab_size,
        sinks=partial(open_sinks, config, folder.path, is_new=folder.is_new),
    )
    return Trainer(
        config=config,
        topology=topology,
        engine=engine,
        method=method,
        batches=batches,
        windows=windows,
        folder=folder,
        run_logger=run_logger,
        stop=job.stop,
        marks=job.watchdog.marks,
        identity=identity,
        progress=progress,
        peak_flops=device_peak_flops(device_name(), costs.precision(config)),
    )


def _identity(
    config: Config, data: PreparedData, checkpoint: Checkpoint | None, *, steps_per_epoch: int
) -> dict[str, Any]:
    """What every checkpoint records of the run (``Trainer.identity``)."""
    identity: dict[str, Any] = {
        "data": data.folder.name,
        "switch_step": switch_step(config, steps_per_epoch),
        OVERLAP: device().type != "cpu",
    }
    if checkpoint:
        identity = identity_of(checkpoint, identity, train_iters=config.training.train_iters)
    if config.inrank.overlap_rank_check is not None:
        identity = identity | {OVERLAP: config.inrank.overlap_rank_check}
    return identity


def _engine(
    job: Job,
    folder: RunFolder,
    topology: Topology,
    method: Method,
    *,
    pretrained: PretrainedWeights | None,
) -> Engine:
    """The model in the structure that the method begins with or the checkpoint has, with its values."""
    config, parallel, checkpoint = job.config, job.parallel, folder.opened
    factory = GPTFactory(
        config,
        parallel,
        vocab_size=topology.vocab_size,
        padded_vocab_size=topology.padded_vocab_size,
        pretrained=pretrained,
    )
    factors = method.structure({name: min(shape) for name, shape in linear_shapes(config).items()})
    engine = Engine(
        factory,
        structure_of(checkpoint, factors) if checkpoint else factors,
        config=config,
        parallel=parallel,
        device=device(),
        accumulation=topology.accumulation_steps,
        deepspeed_json=job.deepspeed_json,
    )
    if checkpoint:
        fill(engine, folder)
    return engine
