"""GPT-2, LLaMA, Qwen2 and Qwen3 of ``transformers`` with linears ``W0 + U V`` or ``U V``, as InRank trains.

This file needs torch and transformers alone: a copy of it lies in every exported folder, so that the model
loads where nothing else is installed. ``config.factors`` names the factorised linears, from the base model on
(such as ``h.0.mlp.c_fc`` or ``layers.0.mlp.gate_up_proj``), with ``rank`` and ``base``: whether there is
a frozen W0.

Letters: I input features, O output features, k the rank. Tensors of a factorised linear: ``weight`` W0 [O, I]
where there is one, ``U`` [O, k], ``V`` [k, I], ``bias`` [O].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel, GPT2Model
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaMLP, LlamaModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2MLP, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3MLP, Qwen3Model
from transformers.pytorch_utils import Conv1D


class InRankGPT2Config(GPT2Config):
    """``separate_qkv``: query, key and value are three linears ``q``, ``k``, ``v`` in place of ``c_attn``.

    ``factors``: rank and base of each factorised linear. ``buffers``: how many of these columns training held
    in reserve; the model computes with all.
    """

    model_type = "inrank_gpt2"
    _auto_class = "AutoConfig"
    factors: dict | None = None
    buffers: dict | None = None
    separate_qkv: bool = False


class InRankLlamaConfig(LlamaConfig):
    """``factors`` may also name ``qkv_proj`` and ``gate_up_proj``: linears that share one V."""

    model_type = "inrank_llama"
    _auto_class = "AutoConfig"
    factors: dict | None = None
    buffers: dict | None = None
    separate_qkv: bool = False


class InRankQwen2Config(Qwen2Config):
    """As :class:`InRankLlamaConfig`."""

    model_type = "inrank_qwen2"
    _auto_class = "AutoConfig"
    factors: dict | None = None
    buffers: dict | None = None
    separate_qkv: bool = False


class InRankQwen3Config(Qwen3Config):
    """As :class:`InRankLlamaConfig`."""

    model_type = "inrank_qwen3"
    _auto_class = "AutoConfig"
    factors: dict | None = None
    buffers: dict | None = None
    separate_qkv: bool = False


class FactorisedLinear(nn.Module):
    """``y = (W0 + U V) x + b``, or ``U V x + b``, through k features."""

    def __init__(self, inputs: int, outputs: int, *, rank: int, base: bool, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs)) if base else None
        self.U = nn.Parameter(torch.empty(outputs, rank))
        self.V = nn.Parameter(torch.empty(rank, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(F.linear(x, self.V), self.U, self.bias)
        return y if self.weight is None else y + F.linear(x, self.weight)


class SharedFactor(nn.Module):
    """The V of several linears with the same input: x -> V x, behind x itself where W0 needs it too."""

    def __init__(self, inputs: int, *, rank: int, base: bool):
        super().__init__()
        self.base = base
        self.V = nn.Parameter(torch.empty(rank, inputs))

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.V)
        return torch.cat([x, z], dim=-1) if self.base else z


class FromSharedFactor(nn.Module):
    """One of those linears, of what :class:`SharedFactor` gives: [.., I + k], or [.., k] without W0."""

    def __init__(self, inputs: int, outputs: int, *, rank: int, base: bool, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs)) if base else None
        self.U = nn.Parameter(torch.empty(outputs, rank))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, xz: Tensor) -> Tensor:
        if self.weight is None:
            return F.linear(xz, self.U, self.bias)
        x, z = xz.split([self.weight.shape[1], self.U.shape[1]], dim=-1)
        return F.linear(x, self.weight) + F.linear(z, self.U, self.bias)


class SeparateQKV(nn.Module):
    """Query, key and value as three linears, in place of GPT-2's fused ``c_attn``."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def project_by_shared_factor(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of ``attention``, whose hidden states have become what its ``qkv_proj`` gives."""
    if args:
        return (attention.qkv_proj(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": attention.qkv_proj(kwargs["hidden_states"])}


class SharedQKV:
    """Of an attention: query, key and value share one V."""

    def __init__(self, config, layer_idx: int, *, rank: int, base: bool):
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        width = config.hidden_size
        self.qkv_proj = SharedFactor(width, rank=rank, base=base)
        for name in ("q_proj", "k_proj", "v_proj"):
            dense = getattr(self, name)
            out, biased = dense.out_features, dense.bias is not None
            setattr(self, name, FromSharedFactor(width, out, rank=rank, base=base, bias=biased))
        # A hook, and no forward of its own: vLLM looks for the call of attention in forward's source. The
        # parent takes only leading sizes from its input before it projects it.
        self.register_forward_pre_hook(project_by_shared_factor, with_kwargs=True)


class InRankLlamaAttention(SharedQKV, LlamaAttention):
    pass


class InRankQwen2Attention(SharedQKV, Qwen2Attention):
    pass


class InRankQwen3Attention(SharedQKV, Qwen3Attention):
    pass


class SharedGateUp:
    """Of an MLP: gate and up share one V."""

    def __init__(self, config, *, rank: int, base: bool):
        super().__init__(config)  # type: ignore[call-arg]
        self.gate_up_proj = SharedFactor(config.hidden_size, rank=rank, base=base)
        for name in ("gate_proj", "up_proj"):
            linear = FromSharedFactor(config.hidden_size, config.intermediate_size, rank=rank, base=base)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.gate_up_proj(x))  # type: ignore[misc]


class InRankLlamaMLP(SharedGateUp, LlamaMLP):
    pass


class InRankQwen2MLP(SharedGateUp, Qwen2MLP):
    pass


class InRankQwen3MLP(SharedGateUp, Qwen3MLP):
    pass


FACTORISED = (FactorisedLinear, SharedFactor, FromSharedFactor)


class DrawsFactors:
    """How a model that is not loaded starts: all of a factorised linear is drawn as the other linears are."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FACTORISED):
            for name, parameter in module.named_parameters(recurse=False):
                std = 0.0 if name == "bias" else self.config.initializer_range
                nn.init.normal_(parameter, std=std)
        elif not isinstance(getattr(module, "c_proj", None), FACTORISED):
            # GPT-2's MLP and attention draw their c_proj themselves, by the name of its weight.
            super()._init_weights(module)  # type: ignore[misc]


def factorise(model: nn.Module, factors: dict[str, dict]) -> None:
    """Put a factorised linear in the place of each named one of the base model ``model``."""
    for name, spec in factors.items():
        dense = model.get_submodule(name)
        inputs, outputs = dense.weight.shape if isinstance(dense, Conv1D) else dense.weight.shape[::-1]
        model.set_submodule(
            name, FactorisedLinear(inputs, outputs, **spec, bias=getattr(dense, "bias", None) is not None)
        )


class InRankGPT2Model(DrawsFactors, GPT2Model):
    config_class = InRankGPT2Config
    _auto_class = "AutoModel"

    def __init__(self, config: InRankGPT2Config):
        super().__init__(config)
        if config.separate_qkv:
            for block in self.h:
                block.attn.c_attn = SeparateQKV(config.hidden_size)
        factorise(self, config.factors or {})
        self.post_init()


class InRankGPT2LMHeadModel(DrawsFactors, GPT2LMHeadModel):
    config_class = InRankGPT2Config
    _auto_class = "AutoModelForCausalLM"
    base_class = InRankGPT2Model

    def __init__(self, config: InRankGPT2Config):
        PreTrainedModel.__init__(self, config)  # the parent's own would build the dense model first
        self.transformer = self.base_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class FactorisedDecoder(DrawsFactors):
    """The base model of LLaMA, Qwen2 or Qwen3.

    Attributes:
        attention, mlp: its modules with a shared V.
    """

    _auto_class = "AutoModel"
    attention: type
    mlp: type

    def __init__(self, config):
        super().__init__(config)  # type: ignore[call-arg]
        factors = dict(config.factors or {})
        for index, layer in enumerate(self.layers):
            if spec := factors.pop(f"layers.{index}.self_attn.qkv_proj", None):
                layer.self_attn = self.attention(config, index, **spec)
            if spec := factors.pop(f"layers.{index}.mlp.gate_up_proj", None):
                layer.mlp = self.mlp(config, **spec)
        factorise(self, factors)  # type: ignore[arg-type]
        self.post_init()


class InRankLlamaModel(FactorisedDecoder, LlamaModel):
    config_class, attention, mlp = InRankLlamaConfig, InRankLlamaAttention, InRankLlamaMLP


class InRankQwen2Model(FactorisedDecoder, Qwen2Model):
    config_class, attention, mlp = InRankQwen2Config, InRankQwen2Attention, InRankQwen2MLP


class InRankQwen3Model(FactorisedDecoder, Qwen3Model):
    config_class, attention, mlp = InRankQwen3Config, InRankQwen3Attention, InRankQwen3MLP


class FactorisedCausalLM(DrawsFactors):
    """The same with its head.

    Attributes:
        base_class: that of the base model.
    """

    _auto_class = "AutoModelForCausalLM"
    base_class: type

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.model = self.base_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class InRankLlamaForCausalLM(FactorisedCausalLM, LlamaForCausalLM):
    config_class, base_class = InRankLlamaConfig, InRankLlamaModel


class InRankQwen2ForCausalLM(FactorisedCausalLM, Qwen2ForCausalLM):
    config_class, base_class = InRankQwen2Config, InRankQwen2Model


class InRankQwen3ForCausalLM(FactorisedCausalLM, Qwen3ForCausalLM):
    config_class, base_class = InRankQwen3Config, InRankQwen3Model
