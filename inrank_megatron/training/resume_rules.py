"""Which settings may change when a run is resumed, and which must be alike on all ranks."""

from pathlib import Path

from inrank_megatron.checkpoint.locate import CONFIG
from inrank_megatron.config.loading import flatten, sections
from inrank_megatron.config.schema import Config
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.inrank import PatienceSettings
from inrank_megatron.lowrank.methods.registry import idle_settings
from inrank_megatron.lowrank.methods.switch import SwitchSettings

# Where things lie, which may change when a run is resumed, and differ from host to host: whether they are the
# same data, every checkpoint's own record says.
PLACES = frozenset(
    {
        "save",
        "data_cache_path",
        "data_path",
        "train_data_path",
        "valid_data_path",
        "test_data_path",
        "dataset",
        "tokenizer",
        "wandb_save_dir",
        "mlflow_tracking_uri",
    }
)
# What may change besides: where a run runs, how long, how it is watched and how it is optimized.
FREE = PLACES | frozenset(
    {
        "train_iters",
        "save_interval",
        "keep_last",
        "use_node_local_storage",
        "resume",
        "exit_duration_in_mins",
        "log_interval",
        "on_loss_spike",
        "eval_interval",
        "eval_iters",
        "distributed_timeout_minutes",
        "preflight",
        "hang_timeout_seconds",
        "replica_check_interval",
        "tensor_model_parallel_size",
        "sequence_parallel",
        "micro_batch_size",
        "recompute_granularity",
        "deterministic_mode",
        "zero_stage",
        "offload_optimizer",
        "loss_scale_window",
        "hysteresis",
        "overflow_limit",
        "overlap_rank_check",
        *sections()["optimizer"].model_fields,
        *sections()["logging"].model_fields,
    }
)
# Weights alone have seen neither data nor a switch: fixed is what gives them their meaning.
FREE_WITH_WEIGHTS_ONLY = (
    FREE
    | {name for section in ("training", "parallel", "data") for name in sections()[section].model_fields}
    | {*SwitchSettings.model_fields, *PatienceSettings.model_fields}
) - {"method"}


def settings_in_common(config: Config) -> dict[str, object]:
    """The settings that must be alike on all ranks of a run."""
    differ = PLACES | {"pretrained_checkpoint"}
    return {name: value for name, value in flatten(config).items() if name not in differ}


def changes(before: Config, now: Config) -> dict[str, str]:
    """What differs of the settings that the method reads, by name: ``8 -> 16``."""
    stored, wanted, idle = flatten(before), flatten(now), idle_settings(now.training.method)
    return {
        name: f"{name} {stored[name]!r} -> {value!r}"
        for name, value in wanted.items()
        if stored[name] != value and name not in idle
    }


def refuse_another_run(path: Path, before: Config, now: Config, *, weights_only: bool) -> None:
    """Refuse settings that make another run than the one in the folder ``path``.

    Args:
        weights_only: whether the run there has made no step since weights alone were read.
    """
    stored, wanted = flatten(before), flatten(now)
    free = FREE_WITH_WEIGHTS_ONLY if weights_only else FREE
    fixed = [name for name in changes(before, now) if name not in free]
    if not fixed:
        return
    # Where nobody gave it, the batch follows from the processes and the micro-batch, which may change.
    batch = stored["global_batch_size"]
    theirs = f"its settings, as in --config {path / CONFIG},"
    same = theirs if batch in (None, wanted["global_batch_size"]) else f"--global-batch-size {batch}"
    listed = "; ".join(f"{name} {stored[name]!r} there, {wanted[name]!r} here" for name in fixed)
    raise UserError(f"{path}: holds another run ({listed}); give {same} or choose another --save")
