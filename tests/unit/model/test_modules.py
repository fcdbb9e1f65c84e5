"""Our two submodules against Megatron's and torch's own."""

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from inrank_megatron.model.modules import MaskPaddedVocabulary, SDPACoreAttention
from tests.groups import join
from tests.harness import run_ranks

LENGTH, BATCH, HEADS, DEPTH = 12, 2, 4, 8


def core_attention(rank: int, world_size: int, kind: type) -> list[Tensor]:
    """Output and gradients of query, key and value."""
    join(1).seed_random(seed=1, step=1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * DEPTH,
        num_attention_heads=HEADS,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
    )
    module = kind(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
    numbers = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(LENGTH, BATCH, HEADS, DEPTH, generator=numbers, requires_grad=True) for _ in range(3)
    ]
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    out = module(*inputs, mask)
    (out * torch.randn(out.shape, generator=numbers)).sum().backward()
    return [out.detach(), *(t.grad for t in inputs)]


def test_core_attention_is_megatrons_without_the_scores():
    ours = run_ranks(core_attention, 1, SDPACoreAttention)[0]
    theirs = run_ranks(core_attention, 1, DotProductAttention)[0]
    assert ours[0].shape == (LENGTH, BATCH, HEADS * DEPTH)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def dropped(rank: int, world_size: int) -> list[Tensor]:
    """Twice in training with the same seed, once in evaluation. All ranks have the same inputs."""
    parallel = join(world_size)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * DEPTH,
        num_attention_heads=HEADS,
        attention_dropout=0.5,
        tensor_model_parallel_size=world_size,
    )
    module = SDPACoreAttention(
        config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self"
    )
    inputs = [
        torch.randn(LENGTH, BATCH, HEADS, DEPTH, generator=torch.Generator().manual_seed(i)) for i in range(3)
    ]
    outputs = []
    for _ in range(2):
        parallel.seed_random(seed=1, step=5)
        outputs.append(module(*inputs))
    return [*outputs, module.eval()(*inputs)]


def test_dropout_repeats_for_a_step_and_differs_between_heads_of_different_ranks():
    first, second = run_ranks(dropped, 2)
    for training, again, evaluation in (first, second):
        assert torch.equal(training, again)
        assert not torch.allclose(training, evaluation)
    assert torch.equal(first[2], second[2])
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    ("start", "masked"), [(0, 0), (64, 28), (128, 64)], ids=["before", "across", "beyond"]
)
def test_mask_of_padded_logits(start, masked):
    """A vocabulary of 100 in shards of 64: the padding is the end of one shard and all of the next."""
    logits = torch.zeros(3, 2, 64)
    MaskPaddedVocabulary(100, start)(None, None, (logits, None))
    assert (logits == -torch.inf).sum(dim=-1).eq(masked).all()
    assert (logits[..., : 64 - masked] == 0).all()
