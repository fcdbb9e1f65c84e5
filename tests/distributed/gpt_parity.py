"""Megatron's GPT on real ranks, and the same weights in Hugging Face's GPT-2. Functions that ranks run."""

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.engine import Engine
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.linalg.factors import gather_matrix
from inrank_megatron.model.gpt import GPTFactory
from inrank_megatron.model.initialise import full_shape, named_generator, shard
from tests.groups import join

VOCABULARY, LAYERS, WIDTH, HEADS, LENGTH = 100, 2, 32, 4, 16
PADDED = 512
"""On four ranks three of the embedding's shards hold nothing but padding."""


def configuration(tensor_parallel: int, sequence_parallel: bool = True, **changes) -> Config:
    return from_flat(
        {
            "num_layers": LAYERS,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "seq_length": LENGTH,
            "train_iters": 10,
            "tensor_model_parallel_size": tensor_parallel,
            "init_method_std": 0.05,
            "sequence_parallel": sequence_parallel,
            **changes,
        }
    )


def factor_specs(config: Config, frozen_base: bool | None) -> dict[str, FactorSpec]:
    """Of every factorisable linear; none if ``frozen_base`` is None."""
    if frozen_base is None:
        return {}
    return {
        name: FactorSpec(capacity=9, active_columns=5, rank=3, frozen_base=frozen_base)
        for name in linear_shapes(config)
    }


def gathered(tensor: Tensor, like: Tensor, parallel: Parallel) -> Tensor:
    if getattr(like, "tensor_model_parallel", False):
        tensor = gather_matrix(tensor, like.partition_dim, parallel.tp_group, like.partition_stride)
    return tensor.detach().clone()


def weights(model: torch.nn.Module, parallel: Parallel) -> dict[str, Tensor]:
    return {name: gathered(p, p, parallel) for name, p in model.named_parameters()}


@torch.no_grad()
def disturb(model: torch.nn.Module, parallel: Parallel) -> None:
    """Noise on every parameter, so that no bias, norm or factor is trivial; columns out of use stay zero."""
    for name, parameter in model.named_parameters():
        full = torch.zeros(full_shape(parameter, parallel))  # drawn on the CPU: alike on every device
        rows = getattr(parameter, "true_rows", full.shape[0])
        used = full[:, :5] if name.endswith(".U") else full[:5] if name.endswith(".V") else full[:rows]
        used.normal_(0.0, 0.1, generator=named_generator(7, name))
        parameter += shard(full, parameter, parallel).to(parameter.device)


def sample() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (3, LENGTH + 1), generator=torch.Generator().manual_seed(4))
    return tokens[:, :-1], tokens[:, 1:]


def initial_weights(
    rank: int, world_size: int, frozen_base: bool | None, padded: int, changes: dict | None = None
) -> dict[str, Tensor]:
    """``changes``: settings of another model than the plain GPT-2."""
    parallel = join(world_size)
    config = configuration(world_size, **(changes or {}))
    factory = GPTFactory(config, parallel, vocab_size=VOCABULARY, padded_vocab_size=padded)
    return weights(factory.build(factor_specs(config, frozen_base)), parallel)


def drawn_again(rank: int, world_size: int, changes: dict | None = None) -> dict[str, Tensor]:
    """``initial_weight`` of every factorisable linear."""
    config = configuration(1, **(changes or {}))
    factory = GPTFactory(config, join(1), vocab_size=VOCABULARY, padded_vocab_size=PADDED)
    return {f"{name}.weight": factory.initial_weight(name) for name in linear_shapes(config)}


def forward_and_backward(
    rank: int,
    world_size: int,
    frozen_base: bool | None,
    sequence_parallel: bool,
    padded: int = PADDED,
    changes: dict | None = None,
) -> dict:
    """Logits, token losses, full weights and full gradients of a disturbed model."""
    parallel = join(world_size)
    config = configuration(world_size, sequence_parallel, **(changes or {}))
    factory = GPTFactory(config, parallel, vocab_size=VOCABULARY, padded_vocab_size=padded)
    model = factory.build(factor_specs(config, frozen_base))
    disturb(model, parallel)
    parallel.seed_random(seed=1, step=1)
    tokens, labels = sample()
    positions = torch.arange(LENGTH).expand_as(tokens)
    with torch.no_grad():
        logits = model(tokens, positions, None)
    losses = Engine.token_losses(model, (tokens, labels))
    losses.mean().backward()
    gradients = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            gradient = p.grad
            if getattr(p, "sequence_parallel", False) and world_size > 1:
                torch.distributed.all_reduce(gradient)
            gradients[name] = gathered(gradient, p, parallel)
    return {
        "logits": gather_matrix(logits, 2, parallel.tp_group),
        "losses": losses.detach(),
        "weights": weights(model, parallel),
        "gradients": gradients,
    }


def hugging_face(weights: dict[str, Tensor]) -> GPT2LMHeadModel:
    """GPT-2 with these weights; a factorised linear gets its product."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)

    def linear(name: str) -> Tensor:
        weight = weights.get(f"{name}.weight", 0)
        if f"{name}.U" in weights:
            weight = weight + weights[f"{name}.U"] @ weights[f"{name}.V"]
        return weight

    state = {
        "transformer.wte.weight": weights["embedding.word_embeddings.weight"][:VOCABULARY],
        "transformer.wpe.weight": weights["embedding.position_embeddings.weight"],
        "transformer.ln_f.weight": weights["decoder.final_layernorm.weight"],
        "transformer.ln_f.bias": weights["decoder.final_layernorm.bias"],
    }
    for i in range(LAYERS):
        here, there = f"decoder.layers.{i}", f"transformer.h.{i}"
        for ours, theirs in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
            for leaf in ("weight", "bias"):
                state[f"{there}.{theirs}.{leaf}"] = weights[f"{here}.{ours}.{leaf}"]
        qkv = {
            leaf: by_kind(weights[f"{here}.self_attention.linear_qkv.{leaf}"]) for leaf in ("weight", "bias")
        }
        state[f"{there}.attn.c_attn.weight"], state[f"{there}.attn.c_attn.bias"] = (
            qkv["weight"].t(),
            qkv["bias"],
        )
        for ours, theirs in (
            ("self_attention.linear_proj", "attn.c_proj"),
            ("mlp.linear_fc1", "mlp.c_fc"),
            ("mlp.linear_fc2", "mlp.c_proj"),
        ):
            state[f"{there}.{theirs}.weight"] = linear(f"{here}.{ours}").t()
            state[f"{there}.{theirs}.bias"] = weights[f"{here}.{ours}.bias"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


def by_kind(rows: Tensor) -> Tensor:
    """Megatron orders the rows head, then query, key, value; Hugging Face the other way round."""
    d = WIDTH // HEADS
    return rows.view(HEADS, 3, d, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)
