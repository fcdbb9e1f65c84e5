"""Which host every rank was meant to be on, for who waits for ranks that do not come."""

import base64
import json
from collections.abc import Sequence

import psutil

_OPTION = "--world_info="


def listed_hosts() -> list[str]:
    """The host of each rank, in their order, by the hostfile that DeepSpeed's launcher above this process has
    read; empty under launchers that know no such list.
    """
    try:
        parent = psutil.Process().parent()
        return hosts_of(parent.cmdline()) if parent else []
    except psutil.Error:
        return []


def hosts_of(words: Sequence[str]) -> list[str]:
    """The same from the launcher's command line. Each host has as many ranks as slots."""
    given = next((word.removeprefix(_OPTION) for word in words if word.startswith(_OPTION)), None)
    if given is None:
        return []
    try:
        slots = json.loads(base64.urlsafe_b64decode(given))
    except ValueError:
        return []
    return [host for host, numbers in slots.items() for _ in numbers]
