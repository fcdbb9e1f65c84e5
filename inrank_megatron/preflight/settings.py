"""All hosts were started with the same configuration."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from inrank_megatron.preflight.findings import Finding, HostFacts, unlike_the_others
from inrank_megatron.preflight.place import Place

SETTINGS, DEEPSPEED = "settings", "DeepSpeed JSON"


class Settings:
    """The run's own settings, which the meeting has compared on every rank, and DeepSpeed's."""

    on_one_host = False

    def gather(self, place: Place) -> dict[str, Any]:
        own = place.meeting.arrivals[place.meeting.ranks.rank]
        extra = json.dumps(place.deepspeed_json, sort_keys=True, default=str)
        return {SETTINGS: own.settings, DEEPSPEED: hashlib.sha256(extra.encode()).hexdigest()}

    def judge(self, hosts: Sequence[HostFacts]) -> Iterator[Finding]:
        remedy = "give --deepspeed-config the same file on every host"
        yield from unlike_the_others(hosts, DEEPSPEED, remedy, shown=partial(self.shown, DEEPSPEED))

    def shown(self, row: str, value: Any) -> str:
        return value[:12]
