"""The command line of a run: flags over a YAML file with the same names."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inrank_megatron.config import deepspeed_json
from inrank_megatron.config.adapt import adapt
from inrank_megatron.config.cluster import Cluster, parse_cluster
from inrank_megatron.config.defaults import (
    QUICKSTART,
    default_config,
    find_config,
    is_shipped,
    naming,
    origins_of,
)
from inrank_megatron.config.flags import build_parser, kebab, unknown_flags
from inrank_megatron.config.loading import (
    OF_LLAMA,
    SIZES,
    fields,
    from_flat,
    read_file,
    replace,
    resolve,
    sections,
    with_present_names,
)
from inrank_megatron.config.schema import Config
from inrank_megatron.config.start import StartSettings, no_start, taken_from_start
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.factorising import FactorSettings
from inrank_megatron.lowrank.methods.inrank import InRankEfficient
from inrank_megatron.lowrank.methods.registry import METHODS, idle_settings

SOURCES = ("data_path", "train_data_path", "dataset")
DATA = (*SOURCES, "valid_data_path", "test_data_path")
# A flag replaces the file's choice, not only the file's setting of the same name.
ALTERNATIVES = {
    **{source: DATA for source in SOURCES},
    **{
        name: tuple(other for other in group if other != name)
        for method in METHODS.values()
        for group in method.alternatives
        for name in group
    },
    "bf16": ("fp16",),
    "fp16": ("bf16",),
    **{
        setting: tuple({name: None for preset in presets.values() for name in preset})
        for setting, presets in (method.presets for method in METHODS.values())
        if setting
    },
    "model_preset": (
        *SIZES,
        "model_type",
        "ffn_hidden_size",
        "max_position_embeddings",
        "norm_epsilon",
        *OF_LLAMA,
    ),
    "model_type": ("ffn_hidden_size",),
}


@dataclass(frozen=True)
class Launch:
    """What the command line asks for.

    Attributes:
        config: the run, resolved for the number of processes.
        config_path: the YAML file that it started from.
        dry_run: print the plan and stop. cluster: what the plan is for, else this launch.
        world_size: processes, of the cluster or of this launch.
        deepspeed_config: content of the DeepSpeed JSON that was given, or None.
        deepspeed_path: where that lies.
        origins: where each setting comes from that is not a flag's: a file, a preset, the defaults.
        notes: what was adapted to the flags, a line each.
    """

    config: Config
    config_path: Path
    dry_run: bool
    cluster: Cluster | None
    world_size: int
    deepspeed_config: dict[str, Any] | None
    deepspeed_path: str | None
    origins: Mapping[str, str]
    notes: tuple[str, ...]

    def naming_origins(self) -> contextlib.AbstractContextManager[None]:
        """Errors within it name the origin of the settings that they are about, unless a flag gave them."""
        return naming(self.origins)


def parse(argv: Sequence[str], *, world_size: int, other_starts: StartSettings = no_start) -> Launch:
    """Reads the command line `argv` (without the program's name) of one of `world_size` processes.

    Args:
        other_starts: reads the settings of models that are no runs, from which a run may start.

    Raises:
        UserError: a faulty file or setting.
        SystemExit: 0 after `--help`, 2 after a flag that does not exist or lacks its value.
    """
    parser = build_parser()
    argv = [kebab(word) for word in argv]
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(unknown_flags(unknown, parser))
    flags = {name: value for name, value in vars(known).items() if name in fields()}
    cluster = parse_cluster(known.cluster) if known.cluster is not None else None
    if cluster is not None and not known.dry_run:
        raise UserError(f"cluster = {known.cluster!r}: only plans a run; give --dry-run too")
    world_size = cluster.world_size if cluster else world_size
    path = Path(known.config) if known.config is not None else default_config(flags)
    flags |= _method(known.inrank, flags)
    deepspeed = (
        deepspeed_json.read_file(known.deepspeed_config) if known.deepspeed_config is not None else None
    )
    named = known.config is not None
    settings, given, origins, notes = _settings(path, flags, deepspeed or {}, other_starts, named=named)
    with naming(origins):
        settings, adapted = adapt(
            settings, given, origins=origins, world_size=world_size, from_shipped=is_shipped(path)
        )
        config = resolve(from_flat(settings), world_size=world_size)
    config = _accumulated(config, settings, deepspeed or {})
    _refuse_idle(flags, config)
    return Launch(
        config=config,
        config_path=path,
        dry_run=known.dry_run,
        cluster=cluster,
        world_size=world_size,
        deepspeed_config=deepspeed,
        deepspeed_path=known.deepspeed_config,
        origins=origins,
        notes=(*notes, *adapted),
    )


def _settings(
    path: Path,
    flags: dict[str, Any],
    deepspeed: dict[str, Any],
    other_starts: StartSettings,
    *,
    named: bool,
) -> tuple[dict[str, Any], frozenset[str], dict[str, str], list[str]]:
    """The settings of the file at `path` under those of the DeepSpeed JSON and the flags; the names of those
    that the user gave; the origins of those that no flag gave; what to say.

    Args:
        named: whether the user has named the file.
    """
    file, notes = read_file(path), []
    own, goes_on = frozenset(file), not named and path != find_config(QUICKSTART)
    if not named:  # a run that goes on keeps its factors, also those that no default would have chosen
        own = own & FactorSettings.model_fields.keys() if goes_on else frozenset()
    from_json = {
        name: value for name, value in deepspeed_json.settings_of(deepspeed).items() if name not in own
    }
    starts_as, said = taken_from_start(file, from_json | flags, other_starts, named=named or goes_on)
    if said:  # another model, of which the file's sizes say nothing
        file = {name: value for name, value in file.items() if name not in sections()["model"].model_fields}
    file |= starts_as
    notes += said
    settings, renamed = with_present_names(_merge(file, from_json | flags))
    notes += renamed
    origins = origins_of(settings, file, path) | dict.fromkeys(from_json, "the DeepSpeed JSON")
    origins |= dict.fromkeys(starts_as, str(flags.get("pretrained_checkpoint")))
    origins = {name: origin for name, origin in origins.items() if name not in flags}
    asked = frozenset() if is_shipped(path) else own
    return settings, asked | from_json.keys() | flags.keys(), origins, notes


def _accumulated(config: Config, settings: Mapping[str, Any], deepspeed: Mapping[str, Any]) -> Config:
    """With the batch that a DeepSpeed JSON's accumulation makes, if none is given."""
    steps = deepspeed.get("gradient_accumulation_steps")
    if settings.get("global_batch_size") is not None or type(steps) is not int or steps < 1:
        return config
    batch = config.training.global_batch_size
    return config if batch is None else replace(config, global_batch_size=steps * batch)


def _method(inrank: bool, flags: dict[str, Any]) -> dict[str, Any]:
    meant = InRankEfficient.name
    method = flags.get("method", meant)
    if inrank and method != meant:
        raise UserError(f"--method {method}: --inrank means --method {meant}; give one of the two")
    return {"method": method} if inrank else {}


def _merge(file: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    replaced = {o for name, value in flags.items() if value is not False for o in ALTERNATIVES.get(name, ())}
    return {name: value for name, value in file.items() if name not in replaced} | flags


def _refuse_idle(flags: dict[str, Any], config: Config) -> None:
    """A flag about ranks in a run without ranks means that `--inrank` was forgotten."""
    method = config.training.method
    for name in flags:
        if name in idle_settings(method):
            readers = [other for other in METHODS if name not in idle_settings(other)]
            remedy = "--inrank" if InRankEfficient.name in readers else f"--method {' or '.join(readers)}"
            shown = f"--{name.replace('_', '-')} {flags[name]}"
            raise UserError(f"{shown}: has no effect with method {method}; give {remedy}, or drop the flag")
