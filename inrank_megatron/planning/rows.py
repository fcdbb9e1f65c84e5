"""Forecasts as rows for programs: plain numbers and words, times in seconds, sizes in bytes."""

from typing import Any

from inrank_megatron.config.costs import Memory
from inrank_megatron.planning.forecast import Forecast, PhaseForecast, slack_of
from inrank_megatron.planning.space import Illegal, settings_of


def rows(forecasts: list[Forecast]) -> list[dict[str, Any]]:
    """A row for each phase of each topology, in the order of ``forecasts``."""
    return [_row(one, phase) for one in forecasts for phase in one.phases]


def illegal_rows(found: list[Illegal]) -> list[dict[str, Any]]:
    """A row for each choice that is refused."""
    return [one.settings | {"illegal": one.reason} for one in found]


def total_row(one: Forecast) -> dict[str, Any]:
    """What the whole run takes."""
    return {
        "hours": one.hours,
        "device_hours": one.device_hours,
        "energy_kwh": one.energy,
        "price": one.price,
        "seconds": {phase.phase.name: phase.seconds for phase in one.phases} | vars(one.occasions),
    }


def _row(one: Forecast, phase: PhaseForecast) -> dict[str, Any]:
    topology = one.candidate.topology
    return settings_of(one.candidate.config) | {
        "method": one.candidate.config.training.method,
        "data_parallel_size": topology.data_parallel_size,
        "accumulation_steps": topology.accumulation_steps,
        "phase": phase.phase.name,
        "columns": phase.phase.columns,
        "steps": phase.phase.steps,
        "parameters": phase.parameters.total,
        "trainable_parameters": phase.parameters.trainable,
        "fits": one.fits,
        "memory_bytes": phase.memory.total,
        "memory": _split(phase.memory),
        "switch_memory_bytes": one.switch and one.switch.total,
        "switch_memory": one.switch and _split(one.switch),
        "flops": phase.flops,
        "bytes_sent": sum(entry.sent for entry in phase.sent),
        "bytes_by_link": phase.bytes_by_link,
        "sent": [vars(entry) for entry in phase.sent],
        "step_seconds": phase.time.total,
        "seconds": vars(phase.time),
        "run_hours": one.hours,
    }


def _split(memory: Memory) -> dict[str, int]:
    return vars(memory) | {"allocator_slack": slack_of(memory)}
