"""The rank that the released criterion finds without data, against the paper's table 3 and a plain loop."""

import pytest
import torch

from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.linalg import oracle
from inrank_megatron.lowrank.linalg.new_columns import full_columns
from inrank_megatron.reporting.untrained import UntrainedProduct, untrained_table

TABLE_3 = {
    (768, 0.8): 152,
    (768, 0.85): 192,
    (768, 0.9): 254,
    (1024, 0.8): 168,
    (1024, 0.85): 213,
    (1024, 0.9): 286,
    (1280, 0.8): 179,
    (1280, 0.85): 230,
    (1280, 0.9): 312,
}


def test_table_3_of_the_paper_needs_no_data():
    rows = {(row["hidden_size"], row["threshold"]): row["rank"] for row in untrained_table()}
    assert rows.keys() == TABLE_3.keys()
    assert {key: rank for key, rank in rows.items() if abs(rank - TABLE_3[key]) > 2} == {}


@pytest.mark.parametrize("shape", [(96, 24), (24, 96)])
def test_spectra_are_those_of_the_dense_product(shape):
    left, right = full_columns(shape, 12, "kaiming", capacity=12, generator=torch.Generator().manual_seed(3))
    product = UntrainedProduct(shape, capacity=12, seed=3)
    for k in (1, 5, 12):
        expected = oracle.singular_values(left[:, :k], right[:k])[:k]
        torch.testing.assert_close(torch.tensor(product.spectrum(k)).double(), expected)


def test_width_that_the_first_columns_do_not_fit_into():
    with pytest.raises(UserError, match="initial_rank 2 \\+ buffer 1 = 3: must not exceed 2"):
        untrained_table([2], [0.9])
