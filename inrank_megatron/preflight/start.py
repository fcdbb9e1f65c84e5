"""The checks that every start makes, before the processes form groups: what each host says, judged by all."""

from collections.abc import Sequence

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

CHECKS: tuple[Check, ...] = (Settings(), Versions(), Data(), Space(), Devices(), Connections(), Folders())
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
    if place.gathers:
        try:
            place.publish(_FACTS, _of_this_host(checks, place))
        except UserError as error:
            place.fail(str(error))
            raise
    told = place.collect(_FACTS, patience=len(checks) * PATIENCE_SECONDS)
    return [HostFacts(host, **own) for host, own in zip(place.hosts, told, strict=True)]


def judged(checks: Sequence[Check], hosts: Sequence[HostFacts]) -> list[Finding]:
    """All findings, errors first."""
    found = [finding for check in checks for finding in check.judge(hosts)]
    return sorted(found, key=lambda finding: finding.level != ERROR)


def _of_this_host(checks: Sequence[Check], place: Place) -> dict[str, dict]:
    facts, texts = {}, {}
    for check in checks:
        for row, value in check.gather(place).items():
            facts[row], texts[row] = value, check.shown(row, value)
    return {"facts": facts, "texts": texts}
