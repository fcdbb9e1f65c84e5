"""Where a setting comes from that no flag gives: a default file, another run, a preset, the schema."""

import contextlib
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from inrank_megatron.config.folders import named_folder
from inrank_megatron.config.loading import PRESETS, fields, method_preset
from inrank_megatron.errors import UserError

QUICKSTART, RUN_CONFIG = "quickstart.yaml", "config.yaml"


def default_config(flags: Mapping[str, Any]) -> Path:
    """The file of a command without ``--config``: that of the run to go on with, else the quick start's."""
    return stored_config(flags) or find_config(QUICKSTART)


def stored_config(flags: Mapping[str, Any]) -> Path | None:
    """The settings of the run to go on with, if there is one yet."""
    if flags.get("resume", "never") != "never" and flags.get("save") is not None:
        stored = named_folder(flags["save"], flag="--save") / RUN_CONFIG
        if stored.is_file():
            return stored
    return None


def shown_path(path: Path) -> str:
    """As short as it works from the present folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def find_config(name: str) -> Path:
    """A file of the `configs` folder, in a checkout or in an installed package."""
    checkout = Path(__file__).parents[2] / "configs" / name
    if checkout.is_file():
        return checkout
    return Path(str(importlib.resources.files("inrank_megatron_configs"))) / name


def is_shipped(path: Path) -> bool:
    """Whether the file is one of the project's own configurations, whose values the user has not chosen."""
    return path.resolve().parent == find_config(QUICKSTART).resolve().parent


def origins_of(settings: Mapping[str, Any], file: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The origin of every setting of the file, a preset, or the schema's defaults."""
    defaults = {name: "the defaults" for name, info in fields().items() if info.default is not None}
    preset = settings.get("model_preset")
    sizes = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    presets = dict.fromkeys(sizes, f"model_preset {preset}")
    name, implied = method_preset(settings)
    presets |= dict.fromkeys(implied, f"{name} {settings.get(name)}")
    return defaults | presets | {name: shown_path(path) for name in settings if name in file}


@contextlib.contextmanager
def naming(origins: Mapping[str, str]) -> Iterator[None]:
    """Errors within it name the origin of the settings that they are about, by ``origins``."""
    try:
        yield
    except UserError as error:
        named: dict[str, list[str]] = {}
        for name in sorted(origins):
            if re.search(rf"\b{name} (= |\d)", str(error)):
                named.setdefault(origins[name], []).append(name)
        if not named:
            raise
        shown = "; ".join(f"{', '.join(names)}: from {origin}" for origin, names in named.items())
        raise UserError(f"{error} ({shown})") from error
