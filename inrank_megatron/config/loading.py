"""Reads a run's settings from a flat mapping or a YAML file, and writes them.

Every `Config` comes from `from_flat`, which fills in presets and derived sizes. Only what depends on the
number of processes is left to `resolve`. `to_yaml` and `load` are inverses.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from inrank_megatron.config.schema import Config, Section
from inrank_megatron.config.yaml_file import read_yaml
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.registry import METHODS

SIZES = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
GPT2_PRESETS = {
    "tiny": dict(zip(SIZES, (4, 192, 4, 256), strict=True)),
    "small": dict(zip(SIZES, (12, 768, 12, 1024), strict=True)),
    "medium": dict(zip(SIZES, (24, 1024, 16, 1024), strict=True)),
    "large": dict(zip(SIZES, (36, 1280, 20, 1024), strict=True)),
}
TIED = {"untie_embeddings_and_output_weights": False}
# ReLoRA's: sizes and epsilon from the authors' model files, sequences as in their runs.
LLAMA_PRESETS = {
    name: {
        **dict(zip(SIZES, sizes, strict=True)),
        "model_type": "llama",
        "ffn_hidden_size": ffn,
        "norm_epsilon": 1e-6,
    }
    for name, sizes, ffn in (
        ("llama-60m", (8, 512, 8, 512), 1376),
        ("llama-130m", (12, 768, 12, 512), 2048),
        ("llama-250m", (24, 768, 16, 512), 2560),
        ("llama-350m", (24, 1024, 16, 512), 2736),
        ("llama-1.3b", (24, 2048, 32, 512), 5461),
    )
}
GROUPED = (*SIZES, "num_query_groups", "ffn_hidden_size", "max_position_embeddings", "rotary_base")
# Shapes that were published with the weights; sequences as in their training, 4096 tokens at most.
PUBLIC_PRESETS: dict[str, dict[str, Any]] = {
    name: {**dict(zip(GROUPED, sizes, strict=True)), "model_type": "llama", **others}
    for name, sizes, others in (
        ("smollm2-135m", (30, 576, 9, 2048, 3, 1536, 8192, 100_000.0), TIED),
        ("smollm2-360m", (32, 960, 15, 2048, 5, 2560, 8192, 100_000.0), TIED),
        ("tinyllama-1.1b", (22, 2048, 32, 2048, 4, 5632, 2048, 10_000.0), {}),
        (
            "llama-3.2-1b",
            (16, 2048, 32, 4096, 8, 8192, 131_072, 500_000.0),
            TIED | {"rope_scaling_factor": 32.0},
        ),
        (
            "qwen2.5-0.5b",
            (24, 896, 14, 4096, 2, 4864, 32_768, 1_000_000.0),
            TIED | {"add_qkv_bias": True, "norm_epsilon": 1e-6},
        ),
        ("mistral-7b", (32, 4096, 32, 4096, 8, 14_336, 32_768, 1_000_000.0), {}),
    )
}
PRESETS: dict[str, dict[str, Any]] = {**GPT2_PRESETS, **LLAMA_PRESETS, **PUBLIC_PRESETS}
OF_LLAMA = (
    "num_query_groups", "kv_channels", "rotary_base", "rope_scaling_factor", "add_qkv_bias", "qk_layernorm",
    "untie_embeddings_and_output_weights",
)  # fmt: skip
"""Settings that have only one value in GPT-2."""
MOST_SHOWN = 8
"""The largest number of mistakes in one message."""
TOO_SHORT = {"too_short": "must name at least one path", "string_too_short": "must not be empty"}


def sections() -> dict[str, type[Section]]:
    """Section name -> its model, in the order of files and help."""
    return {name: cast(type[Section], info.annotation) for name, info in Config.model_fields.items()}


def fields() -> dict[str, FieldInfo]:
    """Field name -> its pydantic description, over all sections."""
    return {name: info for model in sections().values() for name, info in model.model_fields.items()}


def flatten(config: Config) -> dict[str, Any]:
    """Every field by its own name, section after section."""
    return {name: value for section in config.model_dump().values() for name, value in section.items()}


def from_flat(mapping: Mapping[str, Any]) -> Config:
    """The configuration that `mapping` (field name -> value, as in a YAML file) describes.

    Raises:
        UserError: unknown names (with the nearest ones), wrong types, values out of range, sizes missing; one
            line, all of them joined by "; ".
    """
    _refuse_unknown(mapping, "")
    mapping, _ = with_present_names(mapping)
    flat = _with_derived({name: value for name, value in mapping.items() if value is not None})
    nested = {
        section: {name: flat[name] for name in model.model_fields if name in flat}
        for section, model in sections().items()
    }
    try:
        return _with_derived_of_method(Config.model_validate(nested))
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def with_present_names(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`mapping` with the present name of each value that an earlier version called otherwise, and a line
    for each of these.
    """
    renamed, notes = dict(mapping), []
    for name, info in fields().items():
        older, value = info.json_schema_extra, mapping.get(name)
        if isinstance(older, dict) and isinstance(value, str) and value in older:
            renamed[name] = older[value]
            notes.append(f"{name} = {value} is called {older[value]} now")
    return renamed, notes


def replace(config: Config, **changes: Any) -> Config:
    """A copy with some fields (by flat name) changed and everything validated again."""
    return from_flat(flatten(config) | changes)


def resolve(config: Config, *, world_size: int) -> Config:
    """Fills what depends on the number of processes: the "auto" tensor-parallel size and the global batch."""
    size, batch = config.parallel.tensor_model_parallel_size, config.training.global_batch_size
    if size != "auto" and batch is not None:
        return config
    if size == "auto":
        size = auto_size(config, world_size)
    if batch is None and world_size % size == 0:
        batch = config.training.micro_batch_size * (world_size // size)
    return replace(config, tensor_model_parallel_size=size, global_batch_size=batch)


def auto_size(config: Config, world_size: int) -> int:
    """The tensor-parallel size that "auto" means: 2 where processes and model can be divided by two, else
    1.
    """
    model, parallel, training = config.model, config.parallel, config.training
    divided = [world_size, model.num_attention_heads, model.hidden_size, model.ffn_hidden_size]
    groups = model.query_groups
    divided += [groups * model.head_size, 2 if groups == 1 else groups]  # by Megatron's rule (checks.py)
    divided += [model.seq_length] if parallel.sequence_parallel else []
    # Without ZeRO DeepSpeed has no gradient norm of tensor-parallel ranks in BF16 (checks.py).
    possible = not (training.bf16 and parallel.zero_stage == 0)
    return 2 if possible and all(size % 2 == 0 for size in divided) else 1


def to_yaml(config: Config) -> str:
    """The run as a flat YAML file that `load` reads back to an equal `Config`."""
    parts = []
    for name, values in config.model_dump().items():
        parts.append(f"# {name}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return "\n".join(parts)


def method_preset(flat: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The setting that names a preset of the run's method, and what it implies for the other settings."""
    setting, presets = METHODS.get(str(flat.get("method")), Method).presets
    return setting, presets.get(str(flat.get(setting)), {})


def read_file(path: str | Path) -> dict[str, Any]:
    """The flat mapping in a YAML file, not yet validated."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds no `name: value` lines; a configuration file has one setting per line"
        )
    _refuse_unknown(content, f"{path}: ")
    return content


def load(path: str | Path) -> Config:
    """The configuration in a YAML file, such as a run folder's `config.yaml`."""
    mapping = read_file(path)
    try:
        return from_flat(mapping)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """Ending of a message about a mistyped name: the closest known ones, if there are any."""
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.7)
    return f", did you mean {' or '.join(close)}?" if close else ""


def _refuse_unknown(names: Iterable[Any], origin: str) -> None:
    known = fields()
    unknown = [str(name)[:80] for name in names if name not in known]
    if unknown:
        shown = "; ".join(f"{name}: no such setting{nearest(name, known)}" for name in unknown[:MOST_SHOWN])
        more = f"; {len(unknown) - MOST_SHOWN} more" if len(unknown) > MOST_SHOWN else ""
        raise UserError(f"{origin}{shown}{more}; --help lists all settings")


def _with_derived(flat: dict[str, Any]) -> dict[str, Any]:
    preset = flat.get("model_preset")
    flat = {**_preset_for(flat, preset), **method_preset(flat)[1], **flat}
    missing = [name for name in SIZES if name not in flat]
    if missing and preset is None:
        sizes, presets = ", ".join(missing), ", ".join(PRESETS)
        raise UserError(f"model size: {sizes} missing; give model_preset ({presets}) or each of them")
    if type(width := flat.get("hidden_size")) is int:
        # SwiGLU has three matrices instead of two: 8/3 keeps the MLP's size. 64 columns are a GPU's tile.
        llama = flat.get("model_type") == "llama"
        flat.setdefault("ffn_hidden_size", -(-8 * width // (3 * 64)) * 64 if llama else 4 * width)
    if type(length := flat.get("seq_length")) is int:
        flat.setdefault("max_position_embeddings", length)
    return flat


def _with_derived_of_method(config: Config) -> Config:
    filled = METHODS[config.training.method].derived(config)
    return config.model_copy(update={"inrank": config.inrank.model_copy(update=filled)}) if filled else config


def _preset_for(flat: dict[str, Any], preset: Any) -> dict[str, Any]:
    """The preset's settings; without the MLP's width where another width or architecture is asked for, and
    without what only LLaMA has where GPT-2 is.
    """
    sizes = dict(PRESETS.get(preset, {})) if isinstance(preset, str) else {}
    if flat.get("model_type") == "gpt2":
        sizes = {name: value for name, value in sizes.items() if name not in OF_LLAMA}
    if any(flat.get(name, sizes.get(name)) != sizes.get(name) for name in ("hidden_size", "model_type")):
        sizes.pop("ffn_hidden_size", None)
    return sizes


def _explain(error: ValidationError) -> str:
    """One line for all findings: field = value: rule; remedy."""
    rules: dict[str, list[str]] = {}
    shown: dict[str, str] = {}
    for finding in error.errors(include_url=False):
        name, missing = str(finding["loc"][1]), finding["type"] == "missing"
        if missing and name != "train_iters":
            continue  # a size is missing here only behind a faulty preset or source, which is reported
        rule = "is required" if missing else finding["msg"].replace("Input should be", "must be")
        rule = TOO_SHORT.get(finding["type"], rule)
        rules.setdefault(name, []).append(rule)
        shown[name] = name if missing else f"{name} = {_shown(finding['input'])}"
    return "; ".join(f"{shown[name]}: {' or '.join(rules[name])}; {_remedy(name)}" for name in rules)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer, written in base 16, of more digits than Python shows in base 10
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _remedy(name: str) -> str:
    info = fields()[name]
    remedy = f"set it in the file or with --{name.replace('_', '-')}"
    if info.is_required():
        return remedy
    return f"{remedy}, or leave it out" + (f" for {info.default}" if info.default is not None else "")
