"""Tools on a machine with the emulated device; top-level functions that ``run_emulated`` calls."""

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as changed

import torch
from torch.nn import Embedding
from torch.nn.modules.module import register_module_forward_pre_hook

from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.evaluation import models
from tests.emulated.device import rank_of
from tests.emulated.rules import Wait

STOPS = "transformers.generation.utils:__call__"
"""Where it is asked, of every token, whether it was the last."""


@dataclass(frozen=True)
class Output:
    """What was printed, the devices on which matrices were multiplied, and what the host waited for."""

    output: str
    products: set[str]
    waits: list[Wait]
    looked_up: list[tuple[int, ...]]


def converted(source: str, target: str) -> tuple[int, str]:
    """The conversion tool's status and what it wrote to stderr; it computes on the CPU, with values."""
    from tools.convert_checkpoint import main

    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        return main([source, target, "--format", "hf-dense"]), printed.getvalue()


def evaluated(*words: str) -> Output:
    """What ``tools/evaluate.py`` does with these words after it has joined the job."""
    from inrank_megatron.evaluation import command
    from tools.evaluate import parse

    arguments = parse(list(words))
    command._prepared(arguments)  # the text's tokens, which have values
    return _on_device(lambda parallel: command.run(arguments, parallel))


def generated(tokens: int, *words: str) -> Output:
    """What ``tools/generate.py`` does with these words: all is done after ``tokens`` of them."""
    from inrank_megatron.generation import command
    from tools.generate import parse

    done = {STOPS: [False] * (tokens - 1) + [True]}
    return _on_device(lambda parallel: command.run(parse(list(words))), answers=done)


def _on_device(work: Callable[[Parallel], None], *, answers: dict[str, list[bool]] | None = None) -> Output:
    models.read_weights = _without_values
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # transformers' threads would share the one FakeTensorMode
    printed = io.StringIO()
    looked_up: list[tuple[int, ...]] = []
    register_module_forward_pre_hook(
        lambda module, given: (
            looked_up.append(tuple(given[0].shape)) if isinstance(module, Embedding) else None
        )
    )
    with rank_of(0, 1, 1) as (parallel, log), contextlib.redirect_stdout(printed):
        log.answers |= answers or {}
        work(parallel)
    return Output(printed.getvalue(), log.products, log.waits.get("start", []), looked_up)


_read_weights = models.read_weights


def _without_values(path, options):
    """Tensors of files have values, which FakeTensorMode cannot take."""
    module, weights = _read_weights(path, options)
    return module, changed(weights, read=lambda name: torch.empty(weights.shapes[name]))
