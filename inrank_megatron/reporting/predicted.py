"""What the arithmetic of ``--dry-run`` says of a run that has trained, next to the dense model."""

from typing import Any

from inrank_megatron.config.checks import check
from inrank_megatron.config.costs import memory_per_device
from inrank_megatron.config.plan import largest_phase
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.config.topology import topology_of
from inrank_megatron.errors import UserError
from inrank_megatron.reporting.run import PHASES, Run
from inrank_megatron.reporting.sureness import config_of


def predicted_memory(run: Run) -> dict[str, int]:
    """Bytes on one device of dense training with the run's settings and processes, and of each phase that the
    run has trained in: the first at its capacity, the second at its own ranks. Libraries and fragmentation
    are not in it. Empty where the records do not say the settings or the processes.
    """
    config, world = config_of(run), run.summary.get("world")
    if config is None or world is None or not run.ranks:
        return {}
    try:
        check(config, world_size=world["size"])
        topology = topology_of(config, world_size=world["size"], vocab_size=run.summary.get("vocab_size"))
        first = largest_phase(config)
    except UserError:
        return {}
    columns = {
        layer: records[-1].get("active_columns") or records[-1]["rank"]
        for layer, records in run.ranks_by_layer().items()
    }
    shapes: dict[str, dict[str, Any]] = {"dense": {"ranks": None}}
    trained = {PHASES[record["phase"]] for record in run.train}
    if "phase_1" in trained:
        shapes["phase_1"] = {"ranks": first.capacity, "frozen_base": first.frozen_base}
    if "phase_2" in trained and columns.keys() == linear_shapes(config).keys():
        shapes["phase_2"] = {"ranks": columns}
    return {
        name: memory_per_device(config, topology, **shape, device=world["device"]).total
        for name, shape in shapes.items()
    }
