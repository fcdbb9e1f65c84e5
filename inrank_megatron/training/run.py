"""One run from its settings to its report: check, join the job, prepare data, build, train, tell."""

import errno
import socket
from contextlib import nullcontext
from typing import Any

from rich.console import Console

from inrank_megatron.checkpoint.folder import Checkpoint, peek
from inrank_megatron.config import costs
from inrank_megatron.config.cli import Launch
from inrank_megatron.config.deepspeed_json import passthrough
from inrank_megatron.config.out_of_memory import advice, within_memory
from inrank_megatron.config.plan import make_plan, render
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.config.sizes import shown_size
from inrank_megatron.config.topology import Topology, topology_of
from inrank_megatron.data.batches import EvalWindows, TrainBatches
from inrank_megatron.data.cache import quiet
from inrank_megatron.data.prepare import PreparedData, prepare
from inrank_megatron.data.sources import select
from inrank_megatron.data.tokenizer import Tokenizer, load_tokenizer
from inrank_megatron.data.vocabulary import planned_vocabulary
from inrank_megatron.distributed import process_groups as processes
from inrank_megatron.distributed.launcher import launcher_ranks
from inrank_megatron.distributed.placement import hosts_in_words
from inrank_megatron.distributed.platform import backend, check_precision, device, device_name, mixed_devices
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.distributed.rendezvous import meet
from inrank_megatron.distributed.watchdog import GRACE_SECONDS, Neighbours
from inrank_megatron.engine.deepspeed_setup import check_deepspeed
from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.optimizers import check_installed
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.registry import make_method, switch_step
from inrank_megatron.model.gpt import GPTFactory
from inrank_megatron.model.pretrained import PretrainedWeights
from inrank_megatron.reporting.console import unless_nobody_reads
from inrank_megatron.reporting.stages import shown
from inrank_megatron.training.loop import Trainer
from inrank_megatron.training.pretrained import check_tokenizer, choose_pretrained, read_pretrained
from inrank_megatron.training.progress import Progress, resume_progress
from inrank_megatron.training.resuming import fill, identity_of, structure_of
from inrank_megatron.training.run_folder import (
    FolderLock,
    RunFolder,
    choose_run_folder,
    claim,
    settings_in_common,
)
from inrank_megatron.training.run_logger import Journal
from inrank_megatron.training.saving import without_best
from inrank_megatron.training.stopping import StopRequest
from inrank_megatron.training.summary import is_finished, write_summary

FEWEST_STEPS = 100  # with fewer a model writes noise, and a try takes longer than the run
# What the machine refuses, rather than the program.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}


def run(launch: Launch, neighbours: Neighbours) -> None:
    """Train as ``launch`` asks, or print the plan. UserError for everything that the user can correct.

    ``config.checks.check`` has passed its settings.
    """
    config = launch.config
    if launch.dry_run:
        _plan(launch, config)
        return
    tokenizer = _named_tokenizer(config) if config.data.tokenizer else None
    vocab_size = tokenizer.vocab_size if tokenizer else None
    topology = topology_of(config, world_size=launch.world_size, vocab_size=vocab_size)
    extra = passthrough(launch.deepspeed_config or {}, config, topology)
    check_deepspeed(config, accumulation=topology.accumulation_steps, extra=extra)
    check_installed(config)
    check_precision(bf16=config.training.bf16)
    try:
        within_memory(
            lambda: _run(launch, config, topology, extra, neighbours),
            lambda: advice(config, topology, on_cpu=device().type == "cpu"),
        )
    except RuntimeError:
        # What a collective raises when the rank at its other end has ended tells the user nothing.
        if (lost := neighbours.explain(patience=GRACE_SECONDS)) is None:
            raise
        raise UserError(lost) from None
    except OSError as error:
        if error.errno not in REFUSALS | TOO_MANY_FILES:
            raise
        remedy = "raise the limit with ulimit -n" if error.errno in TOO_MANY_FILES else "correct that"
        raise UserError(
            f"{error.filename or config.training.save or 'the output'}: {error.strerror}; {remedy}, then "
            "continue with --resume auto"
        ) from error


def _plan(launch: Launch, config: Config) -> None:
    """Print the plan, without a network."""
    vocab_size, vocabulary = planned_vocabulary(config.data)
    topology = topology_of(config, world_size=launch.world_size, vocab_size=vocab_size)
    extra = passthrough(launch.deepspeed_config or {}, config, topology)
    check_deepspeed(config, accumulation=topology.accumulation_steps, extra=extra)
    if launch.cluster is None:  # which may have other software
        check_installed(config)
    if config.data.dataset is None:  # which a look at would download
        select(config.data)
    if config.training.pretrained_checkpoint is not None:
        choose_pretrained(config)
    if launcher_ranks()[0] == 0:
        plan = make_plan(
            config,
            topology,
            vocab_size=topology.vocab_size,
            device=launch.cluster.device if launch.cluster else device_name(),
            cluster=launch.cluster,
            vocabulary=vocabulary,
        )
        with unless_nobody_reads():
            print("\n".join([*launch.notes, render(plan)]))


def _named_tokenizer(config: Config) -> Tokenizer:
    return load_tokenizer(config.data.tokenizer, parse_special_tokens=config.data.parse_special_tokens)


def _run(
    launch: Launch, config: Config, topology: Topology, deepspeed_json: dict, neighbours: Neighbours
) -> None:
    stop = StopRequest(neighbours, limit_minutes=config.training.exit_duration_in_mins)
    timeout_minutes = config.parallel.distributed_timeout_minutes
    meeting = meet(timeout_minutes=timeout_minutes, settings=settings_in_common(config))
    neighbours.join(meeting)
    parallel = processes.initialise(
        backend=backend(),
        tensor_model_parallel_size=topology.tensor_model_parallel_size,
        timeout_minutes=timeout_minutes,
        meeting=meeting,
    )
    lock = FolderLock()
    folder = parallel.from_first_rank_in_its_time(
        lambda: choose_run_folder(config, lock, name=launch.config_path.stem), meeting, "a verified run"
    )
    folder.notes.extend(launch.notes)
    folder.notes.extend(mixed_devices(parallel.from_every_rank((socket.gethostname(), device_name()))))
    sent = shown_size(costs.tensor_parallel_bytes(config, topology))
    folder.notes.extend(hosts_in_words(meeting, parallel, backend=backend(), sent=sent))
    source = pretrained = None
    if folder.checkpoint is None and config.training.pretrained_checkpoint is not None:
        source, notes = parallel.from_first_rank_in_its_time(
            lambda: choose_pretrained(config), meeting, "a verified pretrained checkpoint"
        )
        pretrained = parallel.in_unison(lambda: read_pretrained(source, config))
        folder.notes.extend(notes)
    if parallel.from_first_rank(lambda: is_finished(folder, config)):
        told = f"the run has all its {config.training.train_iters} steps already\n"
    else:
        weights = folder.checkpoint or source
        if weights is not None and config.data.tokenizer:  # before the text is read
            parallel.from_first_rank(lambda: check_tokenizer(weights, _named_tokenizer(config)))
        with shown(Console()) if parallel.rank == 0 else nullcontext(quiet) as progress:
            identity = folder.checkpoint and peek(folder.checkpoint).get("identity")
            recorded = identity["data"] if identity else None
            data, told = prepare(config.data, progress=progress, recorded=recorded), ""
        meeting.wait_for_all("data")  # nodes that each make their own may differ by more than a timeout
        _check_equal(parallel.from_every_rank(data.folder.name))
        folder.notes.extend(data.notes)
        topology = topology_of(config, world_size=topology.world_size, vocab_size=data.tokenizer.vocab_size)
        if weights is not None:
            folder.notes.extend(parallel.from_first_rank(lambda: check_tokenizer(weights, data.tokenizer)))
        trainer = _build(
            config,
            topology,
            parallel,
            data,
            folder=folder,
            pretrained=pretrained,
            deepspeed_json=deepspeed_json,
            stop=stop,
        )
        parallel.from_first_rank(lambda: claim(folder, config, lock, data.tokenizer))
        folder.notes.extend(filter(None, [lock.note]))
        stop.listen()
        if _train(trainer, data) and parallel.rank == 0 and config.training.train_iters >= FEWEST_STEPS:
            _write_sample(trainer, data)
    neighbours.leave(parallel)
    if parallel.rank == 0:
        # Imported here: no other rank draws, and Matplotlib takes a second.
        from inrank_megatron.reporting.report import write_report
        from inrank_megatron.training.closing import last_lines

        if not stop.is_urgent:
            write_report(folder.path)
        with unless_nobody_reads():
            print(f"\n{told}{last_lines(folder.path, deepspeed_config=launch.deepspeed_path)}")
    processes.shutdown()


def _check_equal(keys: list[str]) -> None:
    """Nodes without shared storage prepare their own copies."""
    other = next((rank for rank, key in enumerate(keys) if key != keys[0]), None)
    if other is not None:
        raise UserError(
            f"the data of rank {other} ({keys[other]}) are not those of rank 0 ({keys[0]}); give every node "
            "the same files and tokenizer"
        )


def _build(
    config: Config,
    topology: Topology,
    parallel: Parallel,
    data: PreparedData,
    *,
    folder: RunFolder,
    pretrained: PretrainedWeights | None,
    deepspeed_json: dict,
    stop: StopRequest,
) -> Trainer:
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
    checkpoint = None
    if folder.checkpoint:
        checkpoint = parallel.in_unison(lambda: Checkpoint(folder.checkpoint, verify=False))
    identity: dict[str, Any] = {
        "data": data.folder.name,
        "switch_step": switch_step(config, batches.steps_per_epoch),
    }
    if checkpoint:
        identity = identity_of(checkpoint, identity, train_iters=config.training.train_iters)
    method = make_method(config, switch_step=identity["switch_step"])
    engine = _engine(config, topology, parallel, method, checkpoint, pretrained, deepspeed_json)
    progress = resume_progress(checkpoint) if checkpoint else Progress()
    return Trainer(
        config=config,
        topology=topology,
        engine=engine,
        method=method,
        batches=batches,
        windows=windows,
        folder=folder,
        identity=identity,
        progress=progress,
        stop=stop,
        journal=Journal(
            folder,
            active=parallel.rank == 0,
            total_steps=config.training.train_iters,
            start_step=progress.step,
            vocab_size=topology.vocab_size,
        ),
        peak_flops=costs.device_peak_flops(device_name(), costs.precision(config)),
    )


def _engine(
    config: Config,
    topology: Topology,
    parallel: Parallel,
    method,
    checkpoint: Checkpoint | None,
    pretrained: PretrainedWeights | None,
    deepspeed_json: dict,
) -> Engine:
    factory = GPTFactory(
        config,
        parallel,
        vocab_size=topology.vocab_size,
        padded_vocab_size=topology.padded_vocab_size,
        pretrained=pretrained,
    )
    factors = method.structure({name: min(shape) for name, shape in linear_shapes(config).items()})
    if checkpoint:
        factors = structure_of(checkpoint, factors)
    engine = Engine(
        factory,
        factors,
        config=config,
        parallel=parallel,
        device=device(),
        accumulation=topology.accumulation_steps,
        deepspeed_json=deepspeed_json,
    )
    if checkpoint:
        fill(engine, checkpoint)
    return engine


def _train(trainer: Trainer, data: PreparedData) -> bool:
    """Train to the end or to a stop; True at the end."""
    first = trainer.engine.parallel.rank == 0
    if first:
        write_summary(trainer, data, finished=False)
    with trainer.journal as journal:
        for note in trainer.folder.notes:
            journal.note(note)
        if "valid" in trainer.windows and (warning := without_best(trainer.config)):
            journal.note(warning)
        journal.message(_headline(trainer))
        finished = trainer.train()
    if first:
        write_summary(trainer, data, finished=finished)
    return finished


def _write_sample(trainer: Trainer, data: PreparedData) -> None:
    # Imported here: transformers' models take a second, on rank 0 alone.
    from inrank_megatron.generation.sample import write_sample

    columns = {name: layer.active for name, layer in trainer.engine.layers.items()} or None
    parameters = costs.parameters(trainer.config, trainer.topology.vocab_size, ranks=columns).total
    if reason := write_sample(trainer.folder.path, data.valid, parameters=parameters):
        print(f"no sample of its text: {reason}")


def _headline(trainer: Trainer) -> str:
    t, training = trainer.topology, trainer.config.training
    start = f"resumed at step {trainer.progress.step}" if trainer.folder.checkpoint else "new run"
    return (
        f"{start} in {trainer.folder.path}: {training.method}, {t.world_size} x {device_name()} = "
        f"{t.tensor_model_parallel_size} tensor-parallel x {t.data_parallel_size} data-parallel; batch "
        f"{t.global_batch_size} = {t.micro_batch_size} x {t.accumulation_steps} accumulated x "
        f"{t.data_parallel_size} sequences; {trainer.batches.steps_per_epoch} steps an epoch"
    )
