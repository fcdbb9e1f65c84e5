"""Room for a checkpoint."""

import pytest

from inrank_megatron.config import costs
from inrank_megatron.preflight.space import SAVE, Space
from tests.unit.preflight.several_hosts import brief, hosts_with, places

CHECK = Space()


@pytest.mark.parametrize(("free", "level"), [(12_000, None), (11_999, "warning"), (3_999, "error")])
def test_a_disk_too_small(free, level):
    hosts = hosts_with(
        SAVE, {"path": "runs", "free": free, "parameters": 1000}, texts=lambda v: CHECK.shown(SAVE, v)
    )
    assert [found[:2] for found in brief(CHECK, hosts)] == ([(level, "a")] if level else [])


def test_what_is_free_where_the_run_will_be(tmp_path):
    [place] = places("--save", str(tmp_path / "runs" / "one"), count=1)
    found = CHECK.gather(place)[SAVE]
    assert found["free"] > 0 and found["path"] == f"{tmp_path}/runs/one"
    assert found["parameters"] == costs.parameters(place.config, place.topology.vocab_size).total
