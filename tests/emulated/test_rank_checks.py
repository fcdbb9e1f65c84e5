"""How often a rank check makes the host wait for a GPU that is not there."""

import pytest

from tests.emulated import rank_checks
from tests.emulated.device import run_emulated

WAITS = {
    "inrank_megatron.distributed.device_copies:wait": 2,
    "inrank_megatron.lowrank.linalg.spectra:rows": 1,
    "inrank_megatron.lowrank.linalg.spectra:_householder": 1,
    "inrank_megatron.engine.layer_distribution:gathered_spectra": 1,
}
"""The cores, everybody's rows; cores and values once more on the Householder path, which a constant for every
error bound asks for; everybody's spectra.
"""


@pytest.mark.parametrize("layers", [2, 12])
def test_a_check_waits_as_often_however_many_layers_there_are(layers):
    assert counted(rank_checks.waits, layers) == WAITS


def test_values_that_are_read_one_by_one_are_found():
    extra = {"inrank_megatron.engine.layer_distribution:gathered_spectra": 1 + 12 // rank_checks.WORLD}
    assert counted(rank_checks.waits_of_values_on_the_device, 12) == WAITS | extra


def counted(function, layers: int) -> dict[str, int]:
    places = [wait.place for wait in run_emulated(function, layers)]
    return {place: places.count(place) for place in places}
