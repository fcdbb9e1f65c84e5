"""``summary.json``: what the report and a later session need to know of a run next to its records."""

import json
import platform as python_platform
from importlib.metadata import version

from inrank_megatron.config import costs
from inrank_megatron.config.plan import largest_phase
from inrank_megatron.config.schema import Config
from inrank_megatron.data.cache import read_json
from inrank_megatron.data.prepare import PreparedData
from inrank_megatron.distributed.peak_memory import Peak, largest
from inrank_megatron.distributed.platform import device_name
from inrank_megatron.reporting.files import write_atomically
from inrank_megatron.reporting.sound import fault_of_summary
from inrank_megatron.training.parts import TrainingParts
from inrank_megatron.training.rank_changes import PHASE_1_COLUMNS
from inrank_megatron.training.run_folder import RunFolder

SUMMARY = "summary.json"
PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers", "datasets")


def is_finished(folder: RunFolder, config: Config) -> bool:
    """Whether the run came to its end, and its newest complete checkpoint has all the steps asked for."""
    if folder.opened is None:
        return False
    steps = folder.opened.state["step"]
    return (
        steps >= config.training.train_iters
        and (read_json(folder.path / SUMMARY) or {}).get("finished") is True
    )


def write_summary(trainer: TrainingParts, data: PreparedData, *, finished: bool) -> None:
    """Write the summary of the run as it is."""
    config, topology = trainer.config, trainer.topology
    summary = {
        "method": config.training.method,
        "world": {
            "size": topology.world_size,
            "device": device_name(),
            "tensor_model_parallel_size": topology.tensor_model_parallel_size,
            "data_parallel_size": topology.data_parallel_size,
        },
        "data": data.meta["splits"],
        "unigram_perplexity": data.meta["unigram_perplexity"],
        "vocab_size": topology.vocab_size,
        "finished": finished,
        "unfinished": trainer.method.unfinished(trainer.engine.views()) if finished else None,
        "steps": trainer.progress.step,
        "train_seconds": trainer.progress.seconds,
        "peak_memory": largest([_peaks_before(trainer), trainer.peak_memory]),
        "versions": {
            "python": python_platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        **_costs(trainer),
    }
    write_atomically(trainer.folder.path / SUMMARY, json.dumps(summary, indent=1).encode())


def _peaks_before(trainer: TrainingParts) -> dict[str, Peak]:
    """Those of earlier sessions of the run."""
    before = read_json(trainer.folder.path / SUMMARY) or {}
    return {} if fault_of_summary(before) else before.get("peak_memory", {})


def _costs(trainer: TrainingParts) -> dict:
    """Parameters and FLOPs per token: dense, and of either phase once it has been reached."""
    config, topology, engine = trainer.config, trainer.topology, trainer.engine
    columns = {name: layer.active_columns for name, layer in engine.layers.items()} or None
    first = columns if engine.in_first_phase else trainer.identity.get(PHASE_1_COLUMNS)
    phases = {
        "dense": (None, False),
        "phase_1": (first, largest_phase(config).frozen_base),
        "phase_2": (None if engine.in_first_phase else columns, False),
    }
    result: dict = {"parameters": {}, "flops_per_token": {}}
    for name, (ranks, base) in phases.items():
        reached = name == "dense" or ranks is not None
        result["parameters"][name] = (
            costs.parameters(config, topology.vocab_size, ranks=ranks, frozen_base=base).total
            if reached
            else None
        )
        result["flops_per_token"][name] = (
            costs.flops_per_token(config, topology.padded_vocab_size, ranks=ranks, frozen_base=base)
            if reached
            else None
        )
    return result
