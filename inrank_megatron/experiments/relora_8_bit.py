"""ReLoRA (arXiv 2307.05695): W0 in 8 bits between merges, as torchao stores it: bytes and loss.

After the start and after every merge W0 is given the values that its 8-bit form has. The products compute
with these in FP32: torchao has no product of a gradient with an 8-bit matrix.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.data.prepare import PreparedData, prepare
from inrank_megatron.distributed.platform import device
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.engine import Engine
from inrank_megatron.errors import UserError
from inrank_megatron.evaluation.perplexity import Score, total_loss
from inrank_megatron.evaluation.windows import SlidingWindows
from inrank_megatron.experiments.controls import batches_of, factory_of
from inrank_megatron.experiments.driver import chosen, train
from inrank_megatron.interop.core.gpt import gpt_logits

STEPS = 160
SETTINGS = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "seq_length": 64,
    "micro_batch_size": 16,
    "vocab_size": 1024,
    "init_method_std": 0.05,
    "optimizer": "adamw",
    "lr": 4e-3,
    "min_lr": 0.0,
    "lr_warmup_iters": 20,
    "factorised_linears": "mlp-attention",
    "qkv_factors": "separate",
    "rank": 8,
}
"""Those of ``relora.py``, from weights that nobody trained."""
VARIANTS = {
    f"{method}, W0 in {bits} bits": {"method": method.lower(), "bits": bits}
    for method in ("LoRA", "ReLoRA")
    for bits in (32, 8)
}


def in_8_bits(matrix: Tensor) -> tuple[Tensor, int]:
    """What torchao's weight-only INT8, a scale for each row, keeps of [O, I], FP32; and its bytes.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ModuleNotFoundError as error:
        raise UserError(
            "torchao is not installed, which keeps W0 in 8 bits; pip install 'inrank-megatron[torchao]'"
        ) from error
    outputs, inputs = matrix.shape
    linear = nn.Linear(inputs, outputs, bias=False, device=matrix.device)
    linear.weight = nn.Parameter(matrix.clone(), requires_grad=False)
    quantize_(linear, Int8WeightOnlyConfig())
    kept: Any = linear.weight
    parts = [getattr(kept, name) for name in kept.__tensor_flatten__()[0]]
    return kept.dequantize(), sum(part.numel() * part.itemsize for part in parts)


def matrices_of(engine: Engine) -> list[Tensor]:
    """W0 of each layer."""
    return [layer.weight for layer in engine.layers.values() if layer.weight is not None]


@torch.no_grad()
def round_w0(engine: Engine) -> None:
    """Give every W0 the values of its 8-bit form."""
    for matrix in matrices_of(engine):
        matrix.copy_(in_8_bits(matrix)[0])


def always_rounded(engine: Engine) -> None:
    """From now on W0 is rounded after all that the method does: after its start, and after merges."""
    apply = engine.apply

    def apply_and_round(*args, **settings) -> None:
        apply(*args, **settings)
        round_w0(engine)

    engine.apply = apply_and_round  # type: ignore[method-assign]


def learn(config: Config, parallel: Parallel, data: PreparedData, *, bits: int) -> dict[str, Any]:
    """Train a small GPT; its test perplexity, before and after W0 is rounded too if it was not, and the bytes
    of W0.
    """
    engines: list[Engine] = []

    def prepare_engine(engine: Engine) -> None:
        engines.append(engine)
        if bits == 8:
            always_rounded(engine)

    factory = factory_of(config, parallel, data)
    min_dims = {name: min(shape) for name, shape in linear_shapes(config).items()}
    batches = batches_of(config, data, shuffled=False)
    train(factory, min_dims, batches, config=config, parallel=parallel, prepare=prepare_engine)
    [engine] = engines
    before = perplexity(engine, data)
    if bits == 8:  # and not again: torchao's form of its own values is not the same
        size = sum(in_8_bits(matrix)[1] for matrix in matrices_of(engine))
        return {"before": before, "after": None, "bytes": size}
    whole = sum(matrix.numel() * matrix.itemsize for matrix in matrices_of(engine))
    round_w0(engine)
    return {"before": before, "after": perplexity(engine, data), "bytes": whole}


def perplexity(engine: Engine, data: PreparedData) -> float:
    """Over the whole test text."""
    config, parallel = engine.config, engine.parallel
    length, rows = config.model.seq_length, config.training.micro_batch_size
    assert data.test is not None, "the shares of the splits are the default ones"
    windows = SlidingWindows(data.test, seq_length=length, stride=length)
    forward = gpt_logits(engine.model.eval(), vocab_size=data.tokenizer.vocab_size)
    nats = total_loss(forward, windows, rows=rows, parallel=parallel, device=device())
    return Score(nats, windows.num_targets, None, None).perplexity


def measure(
    parallel: Parallel,
    seeds: Sequence[int],
    *,
    only: Sequence[str] | None,
    steps: int | None,
    multiplier: float,
    notify: Callable[[str], None],
) -> list[dict]:
    """A row for each method and form of W0; lists have one entry a seed. Four merges a training.

    ``test_perplexity_rounded_at_the_end``: of the same weights, with W0 in 8 bits only for the evaluation.
    """
    steps = steps or STEPS
    schedule = {"train_iters": steps, "rank_check_interval": steps, "factor_lr_multiplier": multiplier}
    schedule |= {"relora_interval": steps // 4, "relora_warmup_iters": steps // 20}
    in_8_bits(torch.ones(1, 1))  # refuses before anything is trained
    data, rows = prepare(from_flat(SETTINGS | schedule).data), []
    for name, variant in chosen(VARIANTS, only).items():
        own = {"method": variant["method"]}
        configs = [from_flat(SETTINGS | schedule | own | {"seed": seed}) for seed in seeds]
        found = [learn(config, parallel, data, bits=variant["bits"]) for config in configs]
        rows.append(
            {
                "variant": name,
                "w0_bytes": found[0]["bytes"],
                "test_perplexity": [round(one["before"], 2) for one in found],
                "test_perplexity_rounded_at_the_end": [
                    one["after"] and round(one["after"], 2) for one in found
                ],
            }
        )
        notify(f"{name}: test perplexity {rows[-1]['test_perplexity']}")
    return rows
