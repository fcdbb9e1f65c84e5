"""DeepSpeed's own settings are compared, which the meeting does not see."""

from dataclasses import replace

from inrank_megatron.preflight.findings import HostFacts
from inrank_megatron.preflight.settings import DEEPSPEED, Settings
from tests.unit.preflight.several_hosts import brief, places

CHECK = Settings()


def test_another_file_of_deepspeed():
    place = places()[0]
    own, other = (
        CHECK.gather(place),
        CHECK.gather(replace(place, deepspeed_json={"prescale_gradients": True})),
    )
    hosts = [HostFacts(name, facts, {}) for name, facts in (("a", own), ("b", own), ("c", other))]
    assert brief(CHECK, hosts) == [("error", "c", other[DEEPSPEED][:12])]
    assert brief(CHECK, hosts[:2]) == []
