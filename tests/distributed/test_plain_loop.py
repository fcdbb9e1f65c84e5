"""The plain PyTorch loop that steps are compared with trains the same dense model."""

import pytest
import torch
import torch.nn.functional as F

from inrank_megatron.benchmarks.blocks import preset_config
from inrank_megatron.benchmarks.plain_loop import PlainGPT2
from inrank_megatron.engine.engine import Engine
from inrank_megatron.model.gpt import GPTFactory
from tests.groups import join
from tests.harness import run_ranks

VOCABULARY = 512
LAYER = {
    "norm_1": "input_layernorm",
    "norm_2": "pre_mlp_layernorm",
    "proj": "self_attention.linear_proj",
    "mlp.0": "mlp.linear_fc1",
    "mlp.2": "mlp.linear_fc2",
}


def losses(rank: int, world_size: int) -> tuple[float, float]:
    """Of both models with the same weights on the same tokens; none is left over."""
    config = preset_config("tiny", seq_length=32, init_method_std=0.2)
    factory = GPTFactory(config, join(1), vocab_size=VOCABULARY, padded_vocab_size=VOCABULARY)
    model, plain = factory.build({}), PlainGPT2(config, VOCABULARY)
    given = dict(model.named_parameters())
    heads, width = config.model.num_attention_heads, config.model.hidden_size
    state = {
        "tokens.weight": given.pop("embedding.word_embeddings.weight"),
        "positions.weight": given.pop("embedding.position_embeddings.weight"),
    }
    for leaf in ("weight", "bias"):
        state[f"norm.{leaf}"] = given.pop(f"decoder.final_layernorm.{leaf}")
        for index in range(config.model.num_layers):
            here, there = f"blocks.{index}", f"decoder.layers.{index}"
            for own, name in LAYER.items():
                state[f"{here}.{own}.{leaf}"] = given.pop(f"{there}.{name}.{leaf}")
            by_head = given.pop(f"{there}.self_attention.linear_qkv.{leaf}")
            parts = by_head.view(heads, 3, width // heads, -1).transpose(0, 1)
            state[f"{here}.qkv.{leaf}"] = parts.reshape(by_head.shape)
    assert not given
    with torch.no_grad():
        plain.load_state_dict(state)
        tokens, labels = torch.randint(VOCABULARY, (2, 3, 32), generator=torch.Generator().manual_seed(0))
        own = F.cross_entropy(plain(tokens).flatten(0, 1), labels.flatten()).item()
        return Engine.loss(model, (tokens, labels)).item(), own


def test_plain_loop_matches_the_engine():
    [(expected, plain)] = run_ranks(losses, 1)
    assert plain == pytest.approx(expected, rel=1e-5) and expected > 6.4
