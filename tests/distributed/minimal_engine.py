"""The smallest training that meets every third-party symbol that the patches replace.

Functions that ranks run.
"""

import deepspeed
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from inrank_megatron.distributed.process_groups import initialise
from inrank_megatron.engine.deepspeed_mpu import DeepSpeedMPU
from inrank_megatron.engine.deepspeed_setup import stop_deepspeed

_SEQUENCE, _VOCABULARY = 32, 128


def train(rank: int, world_size: int, tensor_model_parallel_size: int, bf16: bool) -> list[float]:
    """Four steps of a two-layer GPT with dropout under ZeRO stage 1; the losses of this rank."""
    parallel = initialise(backend="gloo", tensor_model_parallel_size=tensor_model_parallel_size)
    model_parallel_cuda_manual_seed(1234)
    model = _model(tensor_model_parallel_size, bf16)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        mpu=DeepSpeedMPU(parallel),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 1},
            "gradient_clipping": 1.0,
            "bf16": {"enabled": bf16},
        },
    )
    tokens = torch.arange(2 * _SEQUENCE).view(2, _SEQUENCE)
    positions = torch.arange(_SEQUENCE).expand(2, _SEQUENCE)
    mask = torch.ones(1, 1, _SEQUENCE, _SEQUENCE, dtype=torch.bool).triu(1)
    losses = []
    for _ in range(4):
        loss = engine(tokens, positions, mask, labels=tokens).float().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    stop_deepspeed(engine)
    return losses


def _model(tensor_model_parallel_size: int, bf16: bool) -> GPTModel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        use_cpu_initialization=True,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        tensor_model_parallel_size=tensor_model_parallel_size,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
        cuda_graph_scope=[],
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=_VOCABULARY,
        max_sequence_length=_SEQUENCE,
        share_embeddings_and_output_weights=True,
        position_embedding_type="learned_absolute",
    )
