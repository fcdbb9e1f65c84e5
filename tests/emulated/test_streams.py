"""DeepSpeed computes, gathers and reduces on several streams: each waits for what it needs of the others.

The trainings of ``test_training.py`` run under the same rule; here waits are taken away.
"""

import pytest

from tests.emulated import waits
from tests.emulated.device import run_emulated

STAGES_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2:"
STAGE_3 = "deepspeed.runtime.zero.stage3:"
COORDINATOR = "deepspeed.runtime.zero.partitioned_param_coordinator:"
OURS = "inrank_megatron.engine.overlap:<lambda>"
WAITS = {
    1: (f"{STAGES_1_AND_2}average_tensor", OURS),
    2: (f"{STAGES_1_AND_2}average_tensor", OURS),
    3: (
        f"{STAGE_3}__add_grad_to_ipg_bucket",
        f"{STAGE_3}independent_gradient_partition_epilogue",
        f"{COORDINATOR}_fetch_sub_module_impl",
        "deepspeed.runtime.zero.partition_parameters:free_param",
        "inrank_megatron.engine.fragments:finish_writes",
    ),
}
"""By stage: where DeepSpeed's code, or the engine's own, has a stream or the host wait for another."""


@pytest.mark.parametrize("stage", WAITS)
def test_a_wait_that_is_missing_is_found(stage):
    """And with all of them nothing is, though several streams have work."""
    found = run_emulated(waits.without, stage, [None, *WAITS[stage]])
    message, work = found.pop(None)
    print(f"\nZeRO {stage}: {work}")
    assert not message and len([given for given in work.values() if given]) > 1, work
    for place, (message, _) in found.items():
        print(f"without {place}: {message}")
        assert "for which nothing has waited" in message or "given back while" in message, place
