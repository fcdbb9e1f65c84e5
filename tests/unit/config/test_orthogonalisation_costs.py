"""Operations of Muon, Spectron and LoRA-Muon by formula, against what torch counts."""

import pytest
import torch
import torch.distributed as dist

from inrank_megatron.benchmarks.flops import count_flops
from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.orthogonalisation_costs import orthogonalisation_flops, orthogonalised_entries
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.lowrank.linalg.orthogonalise import inverse_roots, orthogonalise, spectral_norms
from tests.harness import run_ranks


def counted(rank, world_size, shapes, rule):
    matrices, group = [torch.randn(shape) for shape in shapes], dist.group.WORLD
    dims = [0 if m >= k else 1 for m, k in shapes]

    def step():
        if rule == "spectron":
            spectral_norms(matrices, dims, group)
        roots = inverse_roots(matrices, dims, group) if rule == "lora-muon" else None
        orthogonalise(matrices, dims, group, roots)

    return count_flops(step)


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({"matrix_optimizer": "muon"}, None),
        ({"matrix_optimizer": "muon", "model_type": "llama", "num_query_groups": 1}, None),
        ({"factor_optimizer": "muon"}, 24),
        ({"factor_optimizer": "spectron"}, 150),
        ({"factor_optimizer": "lora-muon"}, 150),
    ],
    ids=str,
)
def test_operations_are_those_of_the_products(settings, rank):
    config = from_flat({"model_preset": "tiny", "train_iters": 1, **settings})
    h = config.model.hidden_size
    shapes = list(linear_shapes(config).values())
    if rank is None:
        heads = config.model.num_attention_heads + 2 * config.model.query_groups
        shapes += [(heads * config.model.head_size, h), (h, h)] * config.model.num_layers
    else:
        shapes = [pair for out, inp in shapes for pair in ((out, rank), (rank, inp))]
    columns = None if rank is None else dict.fromkeys(linear_shapes(config), rank)
    seen = run_ranks(counted, 1, shapes, next(iter(settings.values())))[0]
    assert orthogonalisation_flops(config, columns) == pytest.approx(seen, rel=0.01)
    assert orthogonalised_entries(config, columns) == sum(out * inp for out, inp in shapes)


def test_adamw_computes_nothing_of_it():
    config = from_flat({"model_preset": "tiny", "train_iters": 1})
    assert orthogonalisation_flops(config, None) == orthogonalised_entries(config, None) == 0
