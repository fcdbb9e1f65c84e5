"""The checks that every start makes, before the processes form groups: what each host says, judged by all."""

from collections.abc import Sequence

import torch.distributed as dist

from inrank_megatron.distributed.peers import ended
from inrank_megatron.errors import UserError
from inrank_megatron.preflight.connections import Connections
from inrank_megatron.preflight.data import Data
from inrank_megatron.preflight.devices import Devices
from inrank_megatron.preflight.findings import ERROR, Check, Finding, HostFacts
from inrank_megatron.preflight.folders import Folders
from inrank_megatron.preflight.place import PATIENCE_SECONDS, Place
from inrank_megatron.preflight.settings import Settings
from inrank_megatron.preflight.space import Space
from inrank_megatron.preflight.versions import Versions

# Those in which hosts wait for each other come first: the others may take longer on one host than on another.
CHECKS: tuple[Check, ...] = (Connections(), Folders(), Settings(), Versions(), Data(), Space(), Devices())
_FACTS = "all facts"


def check_start(place: Place) -> list[str]:
    """What to warn of at the start of a run. Called on all ranks; on one host little is left to compare.

    Raises:
        UserError: on all ranks; a host is not fit for the run.
    """
    several = len(place.machines) > 1
    checks = [check for check in CHECKS if several or check.on_one_host]
    findings = judged(checks, gathered(checks, place))
    errors = [finding for finding in findings if finding.level == ERROR]
    if errors:
        more = f" (one of {len(findings)} findings)" if len(findings) > 1 else ""
        raise UserError(
            f"{errors[0]}{more}; tools/preflight.py, started like this run, lists everything, and "
            "--no-preflight starts without the check"
        )
    return [f"warning: {finding}" for finding in findings]


def gathered(checks: Sequence[Check], place: Place) -> list[HostFacts]:
    """The facts of all hosts, rank 0's first. Called on all ranks.

    Raises:
        UserError: a host does not answer, or could not find out.
    """
    try:
        if place.gathers:
            _publish(checks, place)
        told = place.collect(_FACTS, patience=len(checks) * PATIENCE_SECONDS)
    except dist.DistError:
        raise UserError(ended(f"rank 0 on host {place.hosts[0]}")) from None
    return [HostFacts(host, **own) for host, own in zip(place.hosts, told, strict=True)]


def judged(checks: Sequence[Check], hosts: Sequence[HostFacts]) -> list[Finding]:
    """All findings, errors first."""
    found = [finding for check in checks for finding in check.judge(hosts)]
    return sorted(found, key=lambda finding: finding.level != ERROR)


def _publish(checks: Sequence[Check], place: Place) -> None:
    """The facts of this host, or why there are none: nobody waits for them."""
    facts, texts = {}, {}
    try:
        for check in checks:
            for row, value in check.gather(place).items():
                facts[row], texts[row] = value, check.shown(row, value)
    except UserError as error:
        place.fail(str(error))
        raise
    except Exception as error:
        host = place.hosts[place.number]
        place.fail(
            f"host {host} has failed to check itself ({type(error).__name__}); its own message says why"
        )
        raise
    place.publish(_FACTS, {"facts": facts, "texts": texts})
