"""GPT-2 as a Megatron-Core ``GPTModel`` built from layer specs.

Learned positions, pre-LayerNorm, GELU, biases, tied embeddings. Any linear may be replaced by a factorised
one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from inrank_megatron.config import Config
from inrank_megatron.costs import linear_shapes
from inrank_megatron.layers.factorised import (
    ColumnParallelFactorised,
    RowParallelFactorised,
)
from inrank_megatron.layers.spec import FactorSpec
from inrank_megatron.model.initialise import draw_weight, initialise_parameters
from inrank_megatron.model.modules import LayerNorm, MaskPaddedVocabulary, SDPACoreAttention
from inrank_megatron.parallel import Parallel


@dataclass(frozen=True)
class GPTFactory:
    """Builds the run's model, as often as its structure changes.

    Args:
        vocab_size: the true vocabulary; ids from here up to ``padded_vocab_size`` never receive probability.
    """

    config: Config
    parallel: Parallel
    vocab_size: int
    padded_vocab_size: int

    def build(self, factors: Mapping[str, FactorSpec]) -> GPTModel:
        """The model with its initial weights, on the CPU, in FP32 or BF16 by ``config.training.bf16``.

        ``factors`` says which linears are factorised and how (names from ``costs.linear_shapes``); the rest
        is dense. Initial weights depend on the seed and the names alone: neither on the tensor-parallel size
        nor on ``factors``.
        """
        config = self.config
        specs = [_layer_spec(f"decoder.layers.{i}", factors) for i in range(config.model.num_layers)]
        model = GPTModel(
            config=_transformer_config(config, self.parallel),
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=specs, layer_norm=LayerNorm),
            vocab_size=self.padded_vocab_size,
            max_sequence_length=config.model.max_position_embeddings,
            share_embeddings_and_output_weights=True,
        )
        start = model.embedding.word_embeddings.vocab_start_index
        model.output_layer.register_forward_hook(MaskPaddedVocabulary(self.vocab_size, start))
        initialise_parameters(model, self.parallel, vocab_size=self.vocab_size, **self._distribution())
        return model

    def initial_weight(self, name: str) -> torch.Tensor:
        """The whole initial matrix [O, I] of the factorisable linear ``name``, FP32."""
        return draw_weight(f"{name}.weight", linear_shapes(self.config)[name], **self._distribution())

    def _distribution(self) -> dict:
        return {
            "seed": self.config.training.seed,
            "std": self.config.model.init_method_std,
            "num_layers": self.config.model.num_layers,
        }


def _transformer_config(config: Config, parallel: Parallel) -> TransformerConfig:
    model = config.model

    def leave(weight):
        # initialise_parameters draws all weights; Megatron still runs its initialisers, which mark the
        # shards.
        return weight

    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        layernorm_epsilon=model.norm_epsilon,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        activation_func=F.gelu,
        add_bias_linear=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tp_size,
        sequence_parallel=config.parallel.sequence_parallel and parallel.tp_size > 1,
        bf16=config.training.bf16,
        params_dtype=torch.bfloat16 if config.training.bf16 else torch.float32,
        use_cpu_initialization=True,
        init_method=leave,
        output_layer_init_method=leave,
        embedding_init_method=leave,
        recompute_granularity=config.training.recompute_granularity,
        recompute_method=config.training.recompute_granularity and "uniform",
        recompute_num_layers=config.training.recompute_granularity and 1,
        cuda_graph_scope=[],
    )


def _layer_spec(prefix: str, factors: Mapping[str, FactorSpec]) -> ModuleSpec:
    spec = get_gpt_layer_local_spec()
    sub = spec.submodules
    sub.input_layernorm = LayerNorm
    sub.pre_mlp_layernorm = LayerNorm
    sub.self_attention.submodules.core_attention = SDPACoreAttention
    for parent, submodules, column, row in (
        ("self_attention", sub.self_attention.submodules, "linear_qkv", "linear_proj"),
        ("mlp", sub.mlp.submodules, "linear_fc1", "linear_fc2"),
    ):
        for name, module in ((column, ColumnParallelFactorised), (row, RowParallelFactorised)):
            if (factor := factors.get(f"{prefix}.{parent}.{name}")) is not None:
                setattr(submodules, name, ModuleSpec(module=module, params={"factors": factor}))
    return spec
