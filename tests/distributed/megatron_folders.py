"""Megatron-Core's own saving and loading of sharded models. Functions that ranks run, and what they start
from.
"""

import gc
import multiprocessing
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor

from inrank_megatron.config.loading import replace as with_settings
from inrank_megatron.config.schema import Config
from inrank_megatron.distributed.platform import device
from inrank_megatron.interop.core.gpt import gpt_forward
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.weights import Weights, weight_shapes
from inrank_megatron.interop.megatron import checkpoint as megatron
from inrank_megatron.lowrank.linalg.factors import gather_matrix
from inrank_megatron.model.gpt import GPTFactory
from inrank_megatron.model.initialise import named_generator
from tests.distributed.gpt_parity import (
    LENGTH,
    PADDED,
    VOCABULARY,
    configuration,
    disturb,
    factor_specs,
    sample,
    weights,
)
from tests.groups import join
from tests.harness import ROOT

OF_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def save(
    rank: int,
    world_size: int,
    tensor_parallel: int,
    changes: dict,
    frozen_base: bool | None,
    layout: dict | None,
    folder: str,
    only_factors: bool = False,
) -> dict[str, Tensor]:
    """Save a disturbed model by Megatron-Core; its full weights, without the vocabulary's padding."""
    parallel = join(tensor_parallel)
    config = configuration(tensor_parallel, **changes)
    factory = GPTFactory(config, parallel, vocab_size=VOCABULARY, padded_vocab_size=PADDED)
    model = factory.build(factor_specs(config, frozen_base)).to(device())
    disturb(model, parallel)
    state = model.sharded_state_dict(metadata=dict(layout or {}))  # Megatron-Core adds a process group to it
    if only_factors:
        state = {name: entry for name, entry in state.items() if name.endswith((".U", ".V"))}
    if rank == 0:
        Path(folder).mkdir(parents=True)
    parallel.barrier()
    with _children():
        dist_checkpointing.save(
            state, folder, content_metadata=layout, validate_access_integrity=not only_factors
        )
    full = {name: value.cpu() for name, value in weights(model, parallel).items()}
    return {name: value[:VOCABULARY] if name in OF_VOCABULARY else value for name, value in full.items()}


def load(
    rank: int, world_size: int, tensor_parallel: int, changes: dict, frozen_base: bool | None, folder: str
) -> Tensor:
    """Logits [B, S, vocabulary] of a sharded model that the lines of the page fill from ``folder``."""
    parallel = join(tensor_parallel)
    config = configuration(tensor_parallel, **changes)
    factory = GPTFactory(config, parallel, vocab_size=VOCABULARY, padded_vocab_size=PADDED)
    model = factory.build(uneven(factor_specs(config, frozen_base))).to(device()).eval()
    exec(lines_of_the_page(folder), {"model": model})
    parallel.seed_random(seed=0, step=0)
    tokens = sample()[0].to(device())
    with torch.no_grad():
        logits = model(tokens, torch.arange(LENGTH, device=tokens.device).expand_as(tokens), None)
    return gather_matrix(logits, 2, parallel.tp_group)[..., :VOCABULARY].cpu()


def lines_of_the_page(folder: str) -> str:
    """The Python of ``docs/guides/convert_other_programs.md``, with ``folder`` in the place of its own."""
    page = (ROOT / "docs" / "guides" / "convert_other_programs.md").read_text()
    [lines] = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert lines.count('"exported/iter_0000012"') == 1
    return lines.replace('"exported/iter_0000012"', repr(folder))


def logits(rank: int, world_size: int, changes: dict, frozen_base: bool | None) -> Tensor:
    """Those of :func:`drawn`, on one process."""
    return gpt_forward(drawn(configuration(1, **changes), frozen_base))(sample()[0])


def loaded_logits(rank: int, world_size: int, folder: str, options: Options) -> Tensor:
    """Those of a folder, by the format's own forward."""
    return megatron.forward(Path(folder), options)(sample()[0])


def uneven(specs: dict) -> dict:
    """Ranks that differ from layer to layer, as they do after a first phase."""
    return {
        name: replace(spec, capacity=3 + index % 5, active_columns=3 + index % 5)
        for index, (name, spec) in enumerate(specs.items())
    }


def drawn(config: Config, frozen_base: bool | None) -> Weights:
    """Weights of noise, each a function of its name."""
    config = with_settings(config, tensor_model_parallel_size=1)
    factors = uneven(factor_specs(config, frozen_base))
    shapes = weight_shapes(config, VOCABULARY, factors)

    def read(name: str) -> Tensor:
        return torch.empty(shapes[name]).normal_(0.0, 0.1, generator=named_generator(3, name))

    return Weights("drawn", config, VOCABULARY, factors, read, step=12)


@contextmanager
def _children() -> Iterator[None]:
    """Megatron-Core saves through processes of its own, which daemonic processes may not have.

    The one that manages its queue would import this rank's program: 6 s of a core on four ranks, where a fork
    as of those that write takes none.
    """
    settings = multiprocessing.current_process()._config
    before = settings.get("daemon", False)
    settings["daemon"] = False
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    try:
        yield
    finally:
        settings["daemon"] = before
        filesystem_async._results_queue = None  # ends the process that managed it
        gc.collect()
