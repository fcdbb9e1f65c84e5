"""What is measured for a plan, under the names of a cluster file, also for a model so small that launching
operators and collectives is all that takes time.
"""

import json
import subprocess
import sys

from inrank_megatron.config.cluster import parse_cluster, with_rates
from tests.harness import ROOT

TINY = "--hidden-size 64 --num-attention-heads 2 --seq-length 16 --micro-batch-size 1 --zero-stage 3"


def test_the_rates_of_this_machine_are_those_of_a_cluster():
    """The plan is all that is printed, although DeepSpeed runs."""
    done = subprocess.run(
        [sys.executable, "tools/plan.py", "--cluster", "2xcpu", "--measure", "--json", *TINY.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["cluster"]["measured"]
    names = {"attained_tflops.fp32", "memory_gb_s", "operator_us", "link_gb_s", "collective_us"}
    assert set(found) == names | {"zero3_layer_us"}
    assert all(value > 0 for value in found.values())
    kind = with_rates(parse_cluster("2xcpu"), found).kind
    assert kind.link == found["link_gb_s"] * 1e9 and kind.collective == found["collective_us"] / 1e6
    assert kind.zero3_layer == found["zero3_layer_us"] / 1e6 > kind.operator
