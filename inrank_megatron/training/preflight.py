"""What ``tools/preflight.py`` does on every process: meet, check, measure, tell."""

import json
import time
from collections.abc import Sequence

from inrank_megatron.config.cli import Launch
from inrank_megatron.config.deepspeed_json import passthrough
from inrank_megatron.config.topology import topology_of
from inrank_megatron.data.vocabulary import planned_vocabulary
from inrank_megatron.distributed import process_groups
from inrank_megatron.distributed.platform import backend
from inrank_megatron.distributed.rendezvous import Meeting, meet
from inrank_megatron.preflight import bandwidth
from inrank_megatron.preflight.connections import CONNECTIONS
from inrank_megatron.preflight.findings import ERROR, Finding, HostFacts
from inrank_megatron.preflight.place import Place
from inrank_megatron.preflight.start import CHECKS, gathered, judged
from inrank_megatron.preflight.table import json_of, rows, text_of
from inrank_megatron.training.resume_rules import settings_in_common

COLLECTIVE_MINUTES = 1


def check_hosts(launch: Launch, *, wait_seconds: float, as_json: bool) -> bool:
    """Whether the hosts of this launch are fit for the run; rank 0 prints the table. Collective.

    Args:
        wait_seconds: how long to wait for processes that are not here.

    Raises:
        UserError: processes are missing or do not belong together, or a host does not answer.
    """
    config = launch.config
    vocab_size, _ = planned_vocabulary(config.data)
    topology = topology_of(config, world_size=launch.world_size, vocab_size=vocab_size)
    deepspeed_json = passthrough(launch.deepspeed_config or {}, config, topology)
    meeting = meet(timeout_minutes=wait_seconds / 60, settings=settings_in_common(config))
    began = time.monotonic()
    place = Place(config, topology, deepspeed_json, meeting)
    hosts = gathered(CHECKS, place)
    findings = judged(CHECKS, hosts)
    if not any(f.row == CONNECTIONS for f in findings):  # else a process group would wait for ever
        measured = _measured(place)
        findings += bandwidth.judge(measured)
        hosts = [_joined(host, rates) for host, rates in zip(hosts, measured, strict=True)]
    if meeting.ranks.rank == 0:
        _tell(hosts, findings, seconds=time.monotonic() - began, as_json=as_json)
    _leave(meeting)
    return all(finding.level != ERROR for finding in findings)


def _leave(meeting: Meeting) -> None:
    """Nobody ends before rank 0 has printed, as a launcher ends all when one has failed. Rank 0 has the store
    and ends last.
    """
    rank, others = meeting.ranks.rank, range(1, meeting.ranks.world_size)
    if rank == 0:
        meeting.store.set("table", "")
        if others:
            meeting.store.wait([f"left/{other}" for other in others])
    else:
        meeting.store.wait(["table"])
        meeting.store.set(f"left/{rank}", "")


def _measured(place: Place) -> list[HostFacts]:
    parallel = process_groups.initialise(
        backend=backend(),
        tensor_model_parallel_size=1,
        timeout_minutes=COLLECTIVE_MINUTES,
        meeting=place.meeting,
    )
    try:
        return bandwidth.measure(place, parallel)
    finally:
        process_groups.shutdown()


def _joined(host: HostFacts, rates: HostFacts) -> HostFacts:
    return HostFacts(host.host, host.facts | rates.facts, host.texts | rates.texts)


def _tell(hosts: Sequence[HostFacts], findings: Sequence[Finding], *, seconds: float, as_json: bool) -> None:
    table = rows(hosts, findings)
    if as_json:
        print(json.dumps(json_of(table, findings, seconds=seconds)), flush=True)
    else:
        print(text_of(table, findings, hosts=len(hosts), seconds=seconds), flush=True)
