"""The matrices that are recorded, and the comparisons of the paper's claims."""

from inrank_megatron.experiments.figures8_14 import COMPARED, RECORDS, Case, claims, draw, study
from inrank_megatron.experiments.found import Found
from inrank_megatron.theory.sequences import ATTENTION
from tests.unit.theory.test_perceptron import drawn


def test_a_study_has_a_row_of_each_recorded_matrix_and_a_picture():
    found = Found([], [])
    pictures = drawn(pixels=64, classes=10)
    for kind in ("GRU", ATTENTION):
        study(found, Case("9", kind, 1), pictures, steps=RECORDS, seed=0)
    assert [(row["case"], row["matrix"]) for row in found.rows] == [
        ("GRU, 1 layers", "hidden to hidden"),
        ("Transformer, 1 layers", "attention"),
        ("Transformer, 1 layers", "feed-forward"),
    ]
    assert all(row["values"] == 64 and 0 < row["squares_above_10_percent"] <= 64 for row in found.rows)
    assert len(found.curves) == 3 * RECORDS
    assert len([panel for panel in draw(found.curves).axes if panel.get_visible()]) == 6


def test_a_claim_is_a_difference_of_means_over_layers_for_each_seed():
    section, left, right, _ = COMPARED[0]
    rows = [
        {"case": case, "matrix": matrix, "seed": seed, "above_10_percent": value + seed + layer}
        | {"squares_above_10_percent": 2.0, "test_loss": 0.5}
        for (case, matrix), value in ((left, 20), (right, 10))
        for seed in range(2)
        for layer in range(3)
    ]
    (line,) = claims(rows)
    assert line.startswith(f"{section}, expected more: GRU, 2 layers") and "above_10_percent +10 +10;" in line
