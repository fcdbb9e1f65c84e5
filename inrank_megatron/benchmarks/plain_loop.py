"""A dense GPT-2 in plain PyTorch and the loop that trains it, as anybody writes it without this project."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inrank_megatron.config.schema import Config


class _Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and next to the residual stream: [B, S, h] to [B, S, h]."""

    def __init__(self, width: int, inner: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class PlainGPT2(nn.Module):
    """The dense model of ``config`` with ``vocabulary`` tokens: the same shapes, tied embeddings."""

    def __init__(self, config: Config, vocabulary: int):
        super().__init__()
        model = config.model
        width, eps = model.hidden_size, model.norm_epsilon
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(model.max_position_embeddings, width)
        sizes = (width, model.ffn_hidden_size, model.num_attention_heads, eps)
        self.blocks = nn.Sequential(*(_Block(*sizes) for _ in range(model.num_layers)))
        self.norm = nn.LayerNorm(width, eps=eps)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=model.init_method_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, vocabulary] of ``tokens`` [B, S]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def plain_step(
    config: Config, vocabulary: int, batch: tuple[Tensor, Tensor], *, lr: float
) -> Callable[[], None]:
    """One step of the loop on ``batch``, tokens and labels [B, S] each: FP32, AdamW, clipping."""
    tokens, labels = batch
    model, settings = PlainGPT2(config, vocabulary).to(tokens.device), config.optimizer
    betas = (settings.adam_beta1, settings.adam_beta2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=settings.weight_decay)

    def run() -> None:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return run
