"""What legal settings come to on a given number of processes. Pure arithmetic, without torch."""

import math
from dataclasses import dataclass

from inrank_megatron.config.loading import resolve
from inrank_megatron.config.schema import Config


@dataclass(frozen=True)
class Topology:
    """The sizes of a run.

    Attributes:
        world_size: processes, = tensor_model_parallel_size x data_parallel_size.
        global_batch_size: sequences per step, = micro_batch_size x accumulation_steps x data_parallel_size.
        vocab_size: the true vocabulary, and `padded_vocab_size` the rows of the embedding.
    """

    world_size: int
    tensor_model_parallel_size: int
    data_parallel_size: int
    micro_batch_size: int
    accumulation_steps: int
    global_batch_size: int
    vocab_size: int
    padded_vocab_size: int


def topology_of(config: Config, *, world_size: int, vocab_size: int | None = None) -> Topology:
    """The topology of settings that `checks.check` passes for the given number of processes.

    Args:
        vocab_size: of the tokenizer; None: `config.data.vocab_size`, that of a tokenizer still to be trained.
    """
    config = resolve(config, world_size=world_size)
    vocab_size = config.data.vocab_size if vocab_size is None else vocab_size
    tp = int(config.parallel.tensor_model_parallel_size)  # resolved, so no "auto"
    micro, batch, dp = config.training.micro_batch_size, config.training.global_batch_size, world_size // tp
    assert batch is not None, "resolved, so no batch is left out"
    return Topology(
        world_size=world_size,
        tensor_model_parallel_size=tp,
        data_parallel_size=dp,
        micro_batch_size=micro,
        accumulation_steps=batch // (micro * dp),
        global_batch_size=batch,
        vocab_size=vocab_size,
        padded_vocab_size=pad_vocabulary(vocab_size, multiple=config.model.make_vocab_size_divisible_by * tp),
    )


def pad_vocabulary(vocab_size: int, *, multiple: int) -> int:
    """The next multiple, as Megatron pads: each tensor-parallel rank then holds equally many rows."""
    return math.ceil(vocab_size / multiple) * multiple
