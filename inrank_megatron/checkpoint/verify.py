"""Whether a folder holds a checkpoint as it was written. Nothing in it is trusted before it has been checked.

Sizes are compared before anything is read, names and types before anything is used, so that no content leads
out of the folder, into a traceback or to an allocation that the files' own size does not justify.
"""

import hashlib
import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from inrank_megatron.checkpoint.slices import Shape
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.layers.spec import FactorSpec, stored_name
from inrank_megatron.pointers import refuse_pointer

FORMAT_VERSION, OLDEST_VERSION = 3, 2
MANIFEST, INDEX, STATE = "manifest.json", "index.json", "state.json"
TENSORS = re.compile(r"tensors_\d{5}(_\d{5})?\.safetensors")
JSON_BYTES = 2**27
SCALING = ("skipped", "in_a_row", "state")


class Damaged(UserError):
    """A checkpoint that is incomplete or not what was written: another one has to do."""


def read_manifest(folder: Path) -> dict[str, dict]:
    """File name -> size and hash of every file that is read from the folder.

    Raises:
        Damaged: it is absent, or no manifest.
        UserError: the format is of another version, or it cannot be read.
    """
    refuse_pointer(folder / MANIFEST)
    try:
        manifest = read_json(folder / MANIFEST)
        version, files = manifest["format_version"], manifest["files"]
        complete = (
            type(version) is int and {INDEX, STATE} <= files.keys() and all(map(_is_entry, files.items()))
        )
    except (Damaged, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise Damaged(
            f"{folder}: {MANIFEST} is missing or unreadable, so the checkpoint is not complete; "
            "resume from another one"
        )
    if not OLDEST_VERSION <= version <= FORMAT_VERSION:
        raise UserError(
            f"{folder}: checkpoint format {version}, this one reads {OLDEST_VERSION} and {FORMAT_VERSION}; "
            "use the version of the program that wrote it"
        )
    return files


def compare(folder: Path, files: Mapping[str, dict]) -> None:
    """Compare every byte with the manifest; a file that is not of the recorded size is not read."""
    for name, expected in files.items():
        if size_of(folder / name) != expected["bytes"] or sha256(folder / name) != expected["sha256"]:
            refuse_pointer(folder / name)
            raise Damaged(
                f"{folder / name}: missing, truncated or altered (its SHA-256 is not the manifest's); "
                "resume from another checkpoint"
            )


def read_json(path: Path) -> Any:
    """The content of a JSON file of a sensible size."""
    size = size_of(path)
    if size is None or size > JSON_BYTES:
        damaged(path, "no file" if size is None else f"{size} bytes, more than such a file ever has")
    try:
        return json.loads(read_bytes(path, size))
    except (ValueError, RecursionError):
        damaged(path, "no JSON")


def read_state(folder: Path, shapes: Mapping[str, Shape]) -> dict:
    """What the checkpoint records next to its tensors, with the types that its reader counts on."""
    path, state = folder / STATE, read_json(folder / STATE)
    if not isinstance(state, dict):
        damaged(path, "no JSON object")
    for name, is_sound in _SOUND.items():
        if name in state and not is_sound(state[name]):
            damaged(path, f"{name} = {str(state[name])[:60]!r} makes no sense")
    for name, spec in state.get("engine", {}).get("factors", {}).items():
        _check_factor(path, name, spec, shapes)
    return state


def check_resumable(folder: Path, state: Mapping) -> None:
    """Whether ``state`` has all that a run needs to continue from it.

    Raises:
        Damaged: it names what is missing.
    """
    engine, identity = state.get("engine", {}), state.get("identity", {})
    missing = [name for name in ("step", "seconds") if name not in state]
    missing += [f"engine.{name}" for name in ("factors",) if name not in engine]
    if state.get("weights_only") is not True:
        scaling = engine.get("loss_scaling", {})
        missing += [f"identity.{name}" for name in ("data", "switch_step") if name not in identity]
        missing += ["engine.optimizer_steps"] if "optimizer_steps" not in engine else []
        missing += [f"engine.loss_scaling.{name}" for name in SCALING if name not in scaling]
    if missing:
        damaged(folder / STATE, f"lacks {', '.join(missing)}")


def sha256(path: Path) -> str:
    """Raises UserError where the file is there and cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        unreadable(path, error)


def damaged(path: Path, what: str) -> NoReturn:
    raise Damaged(f"{path}: {what}; resume from another checkpoint")


def _is_entry(item: tuple[Any, Any]) -> bool:
    name, entry = item
    plain = name in (INDEX, STATE) or TENSORS.fullmatch(name)
    return (
        bool(plain) and is_count(entry["bytes"]) and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is not None
    )


def size_of(path: Path) -> int | None:
    """Bytes of a regular file; None where there is none, or a link, which could lead anywhere."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        unreadable(path, error)
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def read_bytes(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        unreadable(path, error)


def unreadable(path: Path, error: OSError) -> NoReturn:
    message = f"{path}: cannot be read ({error.strerror}); correct that, or start with another --save"
    raise UserError(message) from None


def _check_factor(path: Path, name: str, spec: Any, shapes: Mapping[str, Shape]) -> None:
    """A factorised linear's record: its columns are those that its tensors have."""
    types = {
        stored_name(field.name): bool if field.type in (bool, "bool") else int for field in fields(FactorSpec)
    }
    sound = (
        isinstance(spec, dict)
        and spec.keys() <= types.keys()
        and {"columns", "active", "rank"} <= spec.keys()
    )
    if not sound or not all(type(value) is types[key] for key, value in spec.items()):
        damaged(path, f"factors of {name}: {str(spec)[:80]} is not such a record")
    u, v = shapes.get(f"{name}.U", ()), shapes.get(f"{name}.V", ())
    ordered = 0 <= spec["rank"] <= spec["active"] <= spec["columns"]
    if not ordered or u[1:] != (spec["columns"],) or v[:1] != (spec["columns"],):
        damaged(
            path,
            f"factors of {name}: rank {spec['rank']}, {spec['active']} of {spec['columns']} columns, "
            f"next to tensors {list(u)} and {list(v)}",
        )


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_identity(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("data", ""), str):
        return False
    if not isinstance(value.get("overlap_rank_check", False), bool):
        return False
    switch = value.get("switch_step")
    return switch is None or is_count(switch)


def _is_engine(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("factors", {}), dict):
        return False
    steps = value.get("optimizer_steps", {})
    sound = isinstance(steps, dict) and all(map(is_count, steps.values()))
    return sound and _is_scaling(value.get("loss_scaling", {}))


def _is_scaling(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("state", {}), dict):
        return False
    counts = [value[name] for name in ("skipped", "in_a_row") if name in value]
    return all(map(is_count, counts)) and all(map(_is_number, value.get("state", {}).values()))


_SOUND = {
    "step": is_count,
    "seconds": lambda value: _is_number(value) and value >= 0,
    "identity": lambda value: _is_identity(value),
    "weights_only": lambda value: isinstance(value, bool),
    "validation_loss": lambda value: value is None or _is_number(value),
    "validation_tokens": lambda value: value is None or is_count(value),
    "rank_check_under_way": lambda value: isinstance(value, bool),
    "engine": _is_engine,
}
