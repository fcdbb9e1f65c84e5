"""The processes of a run, once they have met."""

from dataclasses import dataclass

from inrank_megatron.config.schema import Config
from inrank_megatron.config.topology import Topology
from inrank_megatron.distributed import process_groups
from inrank_megatron.distributed.platform import backend
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.distributed.rendezvous import Meeting, meet
from inrank_megatron.distributed.watchdog import JobWatchdog
from inrank_megatron.preflight.place import Place
from inrank_megatron.preflight.start import check_start
from inrank_megatron.training.examining import Leaders
from inrank_megatron.training.resume_rules import settings_in_common
from inrank_megatron.training.stopping import StopRequest


@dataclass(frozen=True)
class Job:
    """What all parts of a run need.

    ``deepspeed_json``: what of the user's is passed on to DeepSpeed. ``notes``: warnings of the check before
    the start.
    """

    config: Config
    topology: Topology
    deepspeed_json: dict
    parallel: Parallel
    meeting: Meeting
    stop: StopRequest
    watchdog: JobWatchdog
    notes: list[str]

    @property
    def leaders(self) -> Leaders | None:
        """Of each rank, the first one on its host, where each host has a run folder of its own."""
        local = self.config.training.use_node_local_storage and not self.meeting.is_on_one_machine
        return self.meeting.leaders if local else None


def join(config: Config, topology: Topology, deepspeed_json: dict, watchdog: JobWatchdog) -> Job:
    """Meet the other processes and build the groups. Collective.

    Raises:
        UserError: processes are missing, their settings differ, or a host is not fit for the run.
    """
    stop = StopRequest(watchdog, limit_minutes=config.training.exit_duration_in_mins)
    timeout_minutes = config.parallel.distributed_timeout_minutes
    meeting = meet(timeout_minutes=timeout_minutes, settings=settings_in_common(config))
    notes = check_start(Place(config, topology, deepspeed_json, meeting)) if config.parallel.preflight else []
    hang_timeout = config.parallel.hang_timeout_seconds
    watchdog.join(meeting, hang_timeout=hang_timeout, longest=60 * timeout_minutes)
    parallel = process_groups.initialise(
        backend=backend(),
        tensor_model_parallel_size=topology.tensor_model_parallel_size,
        timeout_minutes=timeout_minutes,
        meeting=meeting,
    )
    return Job(config, topology, deepspeed_json, parallel, meeting, stop, watchdog, notes)
