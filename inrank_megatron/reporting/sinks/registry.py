"""The optional sinks: which setting asks for each, which package it needs. The place for the next one."""

import importlib
import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from inrank_megatron.config.loading import flatten
from inrank_megatron.config.schema import Config
from inrank_megatron.errors import UserError
from inrank_megatron.reporting.files import write_atomically
from inrank_megatron.reporting.sinks.base import BackgroundSink, RunFacts


class Entry(NamedTuple):
    """``setting``: asks for the sink if it has a value. ``module``: beside this one, with ``open_sink``.
    ``package``: what is imported; ``extra``: of this project, which installs it.
    """

    name: str
    setting: str
    module: str
    package: str
    extra: str


SINKS = (
    Entry("Weights & Biases", "wandb_project", "weights_and_biases", "wandb", "wandb"),
    Entry("MLflow", "mlflow_experiment", "mlflow", "mlflow", "mlflow"),
    Entry("Prometheus", "prometheus_port", "prometheus", "prometheus_client", "prometheus"),
)


def check_installed(config: Config) -> None:
    """Refuses a sink whose package is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    for entry in _asked_for(flatten(config)):
        if importlib.util.find_spec(entry.package) is None:
            value = flatten(config)[entry.setting]
            raise UserError(
                f"{entry.setting} = {value!r}: needs the package {entry.package}, which is not installed; "
                f"pip install 'inrank-megatron[{entry.extra}]', or leave it out"
            )


def open_sinks(config: Config, folder: Path, *, is_new: bool) -> list[BackgroundSink]:
    """The sinks that the settings ask for; none of them is waited for. Rank 0 calls it.

    Args:
        folder: of the run. is_new: whether no session of it has been there before.
    """
    settings = flatten(config)
    sinks = []
    for entry in _asked_for(settings):
        path = folder / f"{entry.extra}_run_id"
        facts = RunFacts(
            folder,
            settings,
            known_id=None if is_new else _known_id(path),
            keep_id=partial(_keep_id, path),
        )
        sinks.append(BackgroundSink(entry.name, partial(_open, entry, facts)))
    return sinks


def _open(entry: Entry, facts: RunFacts) -> Any:
    return importlib.import_module(f"{__package__}.{entry.module}").open_sink(facts)


def _asked_for(settings: Mapping[str, Any]) -> list[Entry]:
    return [entry for entry in SINKS if settings[entry.setting] is not None]


def _keep_id(path: Path, value: str) -> None:
    write_atomically(path, f"{value}\n".encode())


def _known_id(path: Path) -> str | None:
    """Of an earlier session; None where there is none that can be read, which starts a new run there."""
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None
