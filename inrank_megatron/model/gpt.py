"""GPT-2 and LLaMA as a Megatron-Core ``GPTModel`` built from layer specs.

GPT-2: learned positions, pre-LayerNorm, GELU, biases, tied embeddings. LLaMA: RoPE, pre-RMSNorm, SwiGLU, and
what its settings say of heads, biases and norms. Any linear may be replaced by a factorised one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from inrank_megatron.config.costs import precision
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import QKV, has_separate_qkv, is_llama, linear_shapes, qkv_layout
from inrank_megatron.distributed.determinism import is_deterministic
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.lowrank.layers.factorised import (
    ColumnParallelFactorised,
    RowParallelFactorised,
)
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.model.initialise import draw_tensor, initial_shapes, initialise_parameters
from inrank_megatron.model.modules import (
    ColumnParallelLinear,
    HeadRMSNorm,
    IndexedEmbedding,
    LayerNorm,
    MaskPaddedVocabulary,
    RMSNorm,
    SDPACoreAttention,
)
from inrank_megatron.model.pretrained import PretrainedWeights
from inrank_megatron.model.separate_qkv import SeparateQKV, SeparateQKVAttention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class GPTFactory:
    """Builds the run's model, as often as its structure changes.

    Args:
        vocab_size: the true vocabulary; ids from here up to ``padded_vocab_size`` never receive probability.
        pretrained: weights to start from; None: they are drawn.
    """

    config: Config
    parallel: Parallel
    vocab_size: int
    padded_vocab_size: int
    pretrained: PretrainedWeights | None = None

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(O, I) of the linears that methods factorise, by module name (``shapes.linear_shapes``)."""
        return linear_shapes(self.config)

    def build(self, factors: Mapping[str, FactorSpec]) -> GPTModel:
        """The model with its initial weights, on the CPU, in the run's precision.

        ``factors`` says which linears are factorised and how (names from ``shapes.linear_shapes``); the rest
        is dense. Drawn weights depend on the seed and the names alone: neither on the tensor-parallel size
        nor on ``factors``.

        Raises:
            UserError: the pretrained weights are those of another model.
        """
        config, llama = self.config, is_llama(self.config)
        # Megatron caches the angles by module for good: those of the models before this one go.
        RotaryEmbedding.forward.cache_clear()
        specs = [_layer_spec(config, i, factors) for i in range(config.model.num_layers)]
        model = GPTModel(
            config=_transformer_config(config, self.parallel),
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=specs, layer_norm=_norm(config)),
            vocab_size=self.padded_vocab_size,
            max_sequence_length=config.model.max_position_embeddings,
            share_embeddings_and_output_weights=not config.model.has_own_head,
            position_embedding_type="rope" if llama else "learned_absolute",
            rotary_base=config.model.rotary_base,
            rope_scaling=config.model.rope_scaling_factor is not None,
            rope_scaling_factor=config.model.rope_scaling_factor or 1.0,
        )
        if is_deterministic() and not llama:
            # Megatron's word embeddings see to themselves; its learned positions are torch's class.
            model.embedding.position_embeddings.__class__ = IndexedEmbedding
        start = model.embedding.word_embeddings.vocab_start_index
        model.output_layer.register_forward_hook(MaskPaddedVocabulary(self.vocab_size, start))
        if self.pretrained is not None:
            shapes = initial_shapes(model, self.parallel, vocab_size=self.vocab_size)
            self.pretrained.account(shapes | {f"{name}.weight": self.linear_shapes[name] for name in factors})
        initialise_parameters(
            model, self.parallel, vocab_size=self.vocab_size, draw=self._full_initial_tensor
        )
        return model

    def initial_weight(self, name: str) -> torch.Tensor:
        """The full initial matrix [O, I] of the factorisable linear ``name``, FP32."""
        return self._full_initial_tensor(f"{name}.weight", self.linear_shapes[name])

    def _full_initial_tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The full initial tensor of the parameter ``name``, FP32."""
        if self.pretrained is not None:
            return self.pretrained(name, shape)
        model = self.config.model
        return draw_tensor(
            name,
            shape,
            seed=self.config.training.seed,
            std=model.init_method_std,
            num_layers=model.num_layers,
            layout=qkv_layout(self.config),
        )


def _norm(config: Config) -> type[nn.Module]:
    return RMSNorm if is_llama(config) else LayerNorm


def _activation(config: Config) -> Callable[[torch.Tensor], torch.Tensor]:
    if is_llama(config):
        return F.silu
    return partial(F.gelu, approximate="tanh") if config.model.openai_gelu else F.gelu


def _transformer_config(config: Config, parallel: Parallel) -> TransformerConfig:
    model, llama = config.model, is_llama(config)

    def leave(weight):
        # initialise_parameters fills all weights; Megatron still runs its initialisers, which mark the
        # shards.
        return weight

    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_size,
        qk_layernorm=model.qk_layernorm,
        layernorm_epsilon=model.norm_epsilon,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        normalization="RMSNorm" if llama else "LayerNorm",
        activation_func=_activation(config),
        gated_linear_unit=llama,
        add_bias_linear=not llama,
        add_qkv_bias=model.add_qkv_bias,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tp_size,
        sequence_parallel=config.parallel.sequence_parallel and parallel.tp_size > 1,
        deterministic_mode=is_deterministic(),
        bf16=config.training.bf16,
        fp16=config.training.fp16,
        params_dtype=DTYPES[precision(config)],
        use_cpu_initialization=True,
        init_method=leave,
        output_layer_init_method=leave,
        embedding_init_method=leave,
        recompute_granularity=config.training.recompute_granularity,
        recompute_method=config.training.recompute_granularity and "uniform",
        recompute_num_layers=config.training.recompute_granularity and 1,
        cuda_graph_scope=[],
    )


def _layer_spec(config: Config, index: int, factors: Mapping[str, FactorSpec]) -> ModuleSpec:
    spec = get_gpt_layer_local_spec()
    sub = spec.submodules
    sub.input_layernorm = sub.pre_mlp_layernorm = _norm(config)
    attention, mlp = sub.self_attention.submodules, sub.mlp.submodules
    attention.core_attention = SDPACoreAttention
    if config.model.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = HeadRMSNorm
    attention.linear_qkv = mlp.linear_fc1 = ColumnParallelLinear
    layer = f"decoder.layers.{index}"
    for parent, submodules, column, row in (
        ("self_attention", attention, "linear_qkv", "linear_proj"),
        ("mlp", mlp, "linear_fc1", "linear_fc2"),
    ):
        for name, module in ((column, ColumnParallelFactorised), (row, RowParallelFactorised)):
            if (factor := factors.get(f"{layer}.{parent}.{name}")) is not None:
                setattr(submodules, name, ModuleSpec(module=module, params={"factors": factor}))
    qkv = f"{layer}.self_attention.linear_qkv"
    if has_separate_qkv(config):
        parts = {part: factors[f"{qkv}.{part}"] for part in QKV if f"{qkv}.{part}" in factors}
        attention.linear_qkv = ModuleSpec(
            module=SeparateQKV, params={"factors": parts, "layout": qkv_layout(config)}
        )
        sub.self_attention.module = SeparateQKVAttention
    return spec
