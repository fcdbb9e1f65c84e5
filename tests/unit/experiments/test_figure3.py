"""What a spectrum's summary says, and a study on pictures that are drawn here."""

import pytest

from inrank_megatron.experiments import figure3, figure15
from inrank_megatron.experiments.figure3 import study, summarised
from tests.unit.theory.test_perceptron import drawn


def test_the_summary_counts_values_and_their_order():
    spectra = [[4.0, 0.0, 0.5, 0.0], [4.0, 2.0, 0.6, 0.0], [4.0, 2.0, 2.0, 0.1]]
    found = summarised([{"values": values} for values in spectra])
    assert found == {"values": 4, "above_10_percent": 3, "energy_of_10": 1.0, "order": pytest.approx(1.0)}
    backward = [[0.0, 0.0, 2.0], [0.0, 2.0, 2.0], [4.0, 2.0, 2.0]]
    assert summarised([{"values": values} for values in backward])["order"] == pytest.approx(-1)
    assert summarised([{"values": [4.0, 2.0]}] * 2)["order"] is None


def test_a_study_has_rows_of_each_case_and_a_picture():
    case = {"initialisation": "ZerO", "optimizer": "SGD", "labels": "true"}
    said: list[str] = []
    found = study([case, case | {"labels": "shuffled"}], drawn(), quick=True, notify=said.append)
    assert said == ["ZerO, SGD, true, seed 0", "ZerO, SGD, shuffled, seed 0"]
    accuracy = {row["labels"]: row["accuracy"] for row in found.rows}
    assert accuracy["true"] > 0.9 and accuracy["shuffled"] < 0.6
    assert len(found.rows) == 4 and {len(point["values"]) for point in found.curves} == {16, 4}
    for module in (figure3, figure15):
        module.draw(found.curves)
