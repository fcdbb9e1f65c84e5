"""A conversion computes on the CPU, also on a machine with a GPU."""

import pytest

from tests.emulated import faults
from tests.emulated.device import run_emulated
from tests.unit.conversion.models import make_weights, write_run


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_both_models_stay_on_the_cpu(tmp_path, family):
    """Megatron moves the angles of a LLaMA to the GPU that it sees, wherever the model is: every conversion
    of one failed there.
    """
    source = write_run(make_weights(family, "dense"), tmp_path / "run")
    status, told = run_emulated(faults.converted, str(source), str(tmp_path / "exported"))
    assert status == 0 and "same model as" in told, told
