"""What is measured for a plan, under the names of a cluster file, also for a model so small that launching
operators and collectives is all that takes time.
"""

from inrank_megatron.benchmarks.blocks import preset_config
from inrank_megatron.benchmarks.rates import rates
from inrank_megatron.config.cluster import parse_cluster, with_rates


def test_the_rates_of_this_machine_are_those_of_a_cluster():
    tiny = preset_config("tiny", hidden_size=64, num_attention_heads=2, seq_length=16, micro_batch_size=1)
    found = rates(tiny, repeats=1)
    names = {"attained_tflops.fp32", "memory_gb_s", "operator_us", "link_gb_s", "collective_us"}
    assert set(found) == names
    assert all(value > 0 for value in found.values())
    kind = with_rates(parse_cluster("2xcpu"), found).kind
    assert kind.link == found["link_gb_s"] * 1e9 and kind.collective == found["collective_us"] / 1e6
