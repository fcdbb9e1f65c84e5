"""The Megatron-Core submodules that need a version of our own: the norms, core attention and the linears
whose bias is as wide as their sharded output.
"""

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor, nn


def _mark(norm: nn.Module, config) -> None:
    """Under sequence parallelism each rank normalises its own tokens, so the gradients of these replicated
    parameters must be summed over the tensor-parallel group; ``param.sequence_parallel`` says so to the
    engine.
    """
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm with the constructor of Megatron's norms, whose own wrapper of it refuses sequence
    parallelism.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, ``x / sqrt(mean(x^2) + eps) * weight``, likewise."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)


class HeadRMSNorm(RMSNorm):
    """The same of each head's query or key. A tensor-parallel rank has heads of its own, so its gradients
    are always to be summed over the group.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = config.tensor_model_parallel_size > 1


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """Megatron's, with the bias added in place: the same bits, without a second tensor of the output's size.

    It returns no bias for others to add.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.skip_bias_add = True  # in the forward pass of the class above

    def forward(self, *args, **kwargs) -> tuple[Tensor, None]:
        """[S, B, I] to [S, B, O/n]; arguments as Megatron's."""
        output, bias = super().forward(*args, **kwargs)
        return output if bias is None else output.add_(bias), None


class IndexedEmbedding(nn.Embedding):
    """torch's embedding by indexing, as Megatron's does it in its deterministic mode: the gradients of a row
    are then added in the order of the tokens.
    """

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class SDPACoreAttention(nn.Module):
    """Causal core attention through ``scaled_dot_product_attention``: the S x S scores are never stored.

    Takes the place of Megatron's ``DotProductAttention``: query, key, value [S, B, heads/n, d] in,
    [S, B, heads/n x d] out, heads sharded over the tensor-parallel group.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask=None,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ) -> Tensor:
        """Causal always; ``attention_mask`` is not looked at, as the model passes None."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [B, heads/n, S, d]
        if self.training and self.dropout > 0 and not self.sequence_parallel:
            # Heads differ between tensor-parallel ranks, so their dropout must too.
            with get_cuda_rng_tracker().fork():
                out = self._attend(q, k, v)
        else:
            out = self._attend(q, k, v)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )


class MaskPaddedVocabulary:
    """Forward hook of the output layer: logits of padding tokens become -inf, so that softmax never sees
    them.

    The vocabulary is padded so that it divides over the tensor-parallel ranks; the padding is not a token.
    """

    def __init__(self, vocab_size: int, shard_start: int):
        self.first_padding = vocab_size - shard_start

    def __call__(self, module, args, output):
        logits = output[0]
        if self.first_padding < logits.shape[-1]:
            logits[..., max(0, self.first_padding) :] = float("-inf")
        return output
