"""One run from its settings to its report: check, join the job, build, train, report."""

import socket
from dataclasses import replace
from pathlib import Path

from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.config import costs
from inrank_megatron.config.cli import Launch
from inrank_megatron.config.deepspeed_json import passthrough
from inrank_megatron.config.sizes import shown_size
from inrank_megatron.config.topology import Topology, topology_of
from inrank_megatron.data.prepare import PreparedData
from inrank_megatron.data.tokenizer import load_tokenizer
from inrank_megatron.distributed import process_groups
from inrank_megatron.distributed.placement import hosts_in_words
from inrank_megatron.distributed.platform import backend, check_precision, device_name, mixed_devices
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.distributed.side_group import SideGroup
from inrank_megatron.distributed.watchdog import JobWatchdog
from inrank_megatron.engine.deepspeed_setup import check_deepspeed
from inrank_megatron.engine.optimizers import check_installed
from inrank_megatron.reporting.console import unless_nobody_reads
from inrank_megatron.reporting.sinks.registry import check_installed as check_sinks
from inrank_megatron.training.build import build, build_again
from inrank_megatron.training.dry_run import print_plan
from inrank_megatron.training.examining import JobExaminer
from inrank_megatron.training.failures import explained
from inrank_megatron.training.folder_lock import FolderLock
from inrank_megatron.training.job import Job, join
from inrank_megatron.training.loop import Trainer
from inrank_megatron.training.rank_log import rank_log
from inrank_megatron.training.repeated_failures import Failures
from inrank_megatron.training.run_folder import RunFolder, choose_run_folder, claim
from inrank_megatron.training.saving import without_best
from inrank_megatron.training.shared_folder import check_shared, check_unshared
from inrank_megatron.training.summary import is_finished, write_summary
from inrank_megatron.training.watching import Rollbacks, RolledBack

FEWEST_STEPS = 100  # after fewer, the sample would be noise, and writing it would take longer than the run


def run(launch: Launch, watchdog: JobWatchdog) -> None:
    """Train as ``launch`` asks, or print the plan. Its settings must have passed ``config.checks.check``.

    Raises:
        UserError: anything that the user can correct.
    """
    if launch.dry_run:
        print_plan(launch)
        return
    config, vocab_size = launch.config, None
    if name := config.data.tokenizer:
        tokenizer = load_tokenizer(name, parse_special_tokens=config.data.parse_special_tokens)
        vocab_size = tokenizer.vocab_size
    topology = topology_of(config, world_size=launch.world_size, vocab_size=vocab_size)
    deepspeed_json = passthrough(launch.deepspeed_config or {}, config, topology)
    check_deepspeed(config, accumulation=topology.accumulation_steps, extra=deepspeed_json)
    check_installed(config)
    check_sinks(config)
    check_precision(bf16=config.training.bf16)
    explained(
        lambda: _run(launch, topology, deepspeed_json, watchdog),
        config=config,
        topology=topology,
        watchdog=watchdog,
    )


def _run(launch: Launch, topology: Topology, deepspeed_json: dict, watchdog: JobWatchdog) -> None:
    """Meet the other processes, choose the folder, train unless that is done, report."""
    job = join(launch.config, topology, deepspeed_json, watchdog)
    config, parallel, lock, done = job.config, job.parallel, FolderLock(), ""
    examiner, name = JobExaminer(parallel, SideGroup(parallel), job.leaders), launch.config_path.stem
    if parallel.rank != 0:
        examiner.serve()
    folder = parallel.broadcast_from_rank_0_when_ready(
        lambda: examiner.lead(lambda: choose_run_folder(config, lock, name=name, examine=examiner)),
        job.meeting,
        "a verified run",
    )
    folder = _with_holders(folder, job, examiner)
    folder.notes.extend([*launch.notes, *job.notes, *_machines_in_words(job)])
    if parallel.broadcast_from_rank_0(lambda: is_finished(folder, config)):
        done = f"the run has all its {config.training.train_iters} steps already\n"
    else:
        _train(job, folder, lock, examiner)
    watchdog.leave(parallel)
    if parallel.rank == 0:
        # Imported here: no other rank draws, and Matplotlib takes a second.
        from inrank_megatron.reporting.report import write_report
        from inrank_megatron.training.closing import last_lines

        if not job.stop.is_urgent:
            write_report(folder.path)
        with unless_nobody_reads():
            print(f"\n{done}{last_lines(folder.path, deepspeed_config=launch.deepspeed_path)}")
    process_groups.shutdown()


def _machines_in_words(job: Job) -> list[str]:
    """Notes about the machines of a job with several hosts or several kinds of device."""
    mixed = mixed_devices(job.parallel.gather_from_all_ranks((socket.gethostname(), device_name())))
    sent = shown_size(costs.tensor_parallel_bytes(job.config, job.topology))
    return [*mixed, *hosts_in_words(job.meeting, job.parallel, backend=backend(), sent=sent)]


def _with_holders(folder: RunFolder, job: Job, examiner: JobExaminer) -> RunFolder:
    """The folder; if the hosts do not share it, with a record of which host has which files."""
    if job.leaders is None:
        return folder
    holders = job.parallel.broadcast_from_rank_0(lambda: examiner.holders)
    return replace(folder, leaders=job.leaders, holders=holders)


def _train(job: Job, folder: RunFolder, lock: FolderLock, examiner: JobExaminer) -> None:
    """Build everything, then train to the end or to a stop."""
    config, parallel = job.config, job.parallel
    trainer, data = build(job, folder)
    leads = parallel.rank in (folder.leaders or [0])
    parallel.call_or_raise_on_all_ranks(
        lambda: claim(folder, config, lock, data.tokenizer) if leads else None
    )
    if folder.leaders is None:
        check_shared(folder.path, parallel)
    else:
        folder.notes.append(check_unshared(folder.path, parallel, folder.leaders))
    folder.notes.extend(filter(None, [lock.note]))
    failures = Failures(folder.path, config, session=job.meeting.arrivals[0].created)
    job.watchdog.on_failure = failures.note
    job.stop.listen()
    first = parallel.rank == 0
    if first:
        write_summary(trainer, data, finished=False)
    if "valid" in trainer.windows and (warning := without_best(config)):
        folder.notes.append(warning)
    with rank_log(folder.path, rank=parallel.rank, device=device_name()):
        finished = _session(trainer, folder)
        rollbacks = Rollbacks()
        while isinstance(finished, RolledBack):
            note = rollbacks.note(finished)
            opened = _opened(finished.checkpoint, job.parallel, examiner)
            folder = replace(folder, is_new=False, opened=opened, notes=[note])
            folder = _with_holders(folder, job, examiner)
            trainer.engine.discard()
            trainer = build_again(job, folder, data, skipped_batches=finished.skipped_batches)
            finished = _session(trainer, folder)
    if leads:
        failures.clear()
    if first:
        write_summary(trainer, data, finished=finished)
    if first and finished and config.training.train_iters >= FEWEST_STEPS:
        _write_sample(trainer, data)


def _opened(checkpoint: Path, parallel: Parallel, examiner: JobExaminer) -> Checkpoint:
    """Open a checkpoint of this session; all ranks verify it."""
    if parallel.rank != 0:
        examiner.serve()
    return parallel.broadcast_from_rank_0(
        lambda: examiner.lead(lambda: Checkpoint(checkpoint, examine=examiner))
    )


def _session(trainer: Trainer, folder: RunFolder) -> bool | RolledBack:
    """Train to the end, a stop or a rollback. Returns whether the run is finished, or the rollback."""
    with trainer.run_logger as run_logger:
        for note in folder.notes:
            run_logger.note(note)
        run_logger.message(_headline(trainer))
        try:
            return trainer.train()
        except RolledBack as rolled_back:
            return rolled_back.with_traceback(None)  # the traceback would keep the trainer's memory alive


def _write_sample(trainer: Trainer, data: PreparedData) -> None:
    # Imported here: transformers' models take a second, on rank 0 alone.
    from inrank_megatron.generation.sample import write_sample

    columns = {name: layer.active_columns for name, layer in trainer.engine.layers.items()} or None
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
        f"{t.data_parallel_size} sequences; {trainer.batches.steps_per_epoch} steps per epoch"
    )
