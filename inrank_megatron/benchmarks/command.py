"""Measure what layers, rank decisions and training steps cost: one subcommand for each measurement."""

import argparse
import os
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module

from inrank_megatron.config.loading import GPT2_PRESETS, PRESETS
from inrank_megatron.distributed.environment import complete
from inrank_megatron.distributed.launcher import refuse_ranks
from inrank_megatron.errors import UserError

NOTES = {
    "wire": "elements that tensor-parallel ranks send for one MLP, and operations of each rank",
    "rank-decisions": "time of a rank decision from the factors, compared with a dense SVD and with training",
    "switch": "time of the truncation W0 + U V -> U* V*, for each linear and for complete models",
    "layer": "time of an MLP and of a transformer layer, forward and backward, compared with dense",
    "step": "time of a full training step, compared with dense",
    "decoding": "tokens per second of factorised exports in transformers, compared with dense",
    "rates": "what this machine attains, in the units of a cluster file of tools/plan.py",
    "optimizers": "operations, state and time of a step under AdamW, Muon, Spectron and LoRA-Muon",
    "counts": "operators, collectives and bytes of a training step, by ZeRO stage",
    "memory": "bytes of one MLP: parameters, gradients, optimizer states, kept activations",
    "checkpoint": "what one rank of 64 copies, writes and sends to save a checkpoint",
}
DEFAULTS = {"step": "tiny", "optimizers": "tiny", "counts": "tiny", "rates": "tiny", "decoding": "small"}
WITHOUT_RANK = ("switch", "decoding", "checkpoint", "rates")
TIMED = ("rank-decisions", "switch", "layer", "step", "decoding", "optimizers", "rates")
ONE_THREAD = ("rank-decisions", "decoding", "rates")
COLUMNS = "limit: what arithmetic or a target allows; gap: measured / limit."


def main(argv: list[str]) -> None:
    """Measure and print. Raises UserError for what a user can correct."""
    complete()
    options = _parse(argv)
    refuse_ranks("bench.py")
    if options.what == "wire":
        # Nothing is computed, and counts are the same everywhere.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Imported here: Megatron-Core and DeepSpeed take seconds, --help and mistakes should not.
    from inrank_megatron.distributed.platform import prepare_process

    prepare_process()
    warnings.filterwarnings("ignore", category=FutureWarning)
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    module = import_module(f"inrank_megatron.benchmarks.{options.what.replace('-', '_')}")
    rows = list(_measurements(options, module.measure))
    from inrank_megatron.benchmarks.rows import print_table, to_json

    if options.json:
        print(to_json(rows))
    else:
        print_table(f"{options.what}: {NOTES[options.what]}", f"{COLUMNS}\n\n{module.__doc__}", rows)


def _measurements(options: argparse.Namespace, measure: Callable) -> Iterable:
    from inrank_megatron.benchmarks.blocks import RANKS

    preset, timed = options.preset, {"repeats": options.repeats} if options.what in TIMED else {}
    if options.what == "switch":
        return measure((preset,) if preset else ("small", "medium", "large"), **timed)
    if options.what in WITHOUT_RANK:
        return measure(preset, **timed)
    sizes = (options.tensor_model_parallel_size,) if options.what == "wire" else ()
    return measure(preset, options.rank or RANKS[preset], *sizes, **timed)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, note in NOTES.items():
        command = commands.add_parser(name, help=note, description=note, allow_abbrev=False)
        command.add_argument("--json", action="store_true", help="print a JSON list of rows and nothing else")
        command.add_argument(
            "--preset",
            choices=PRESETS if name == "decoding" else GPT2_PRESETS,
            help="size of the model [large; step, optimizers, counts and rates: tiny; decoding: small; "
            "switch: all]",
        )
        if name not in WITHOUT_RANK:
            command.add_argument("--rank", type=_positive, help="rank of phase 2 [the paper's]")
        if name in TIMED:
            command.add_argument("--repeats", type=_positive, default=5, help="rounds to take medians of [5]")
        threads = 1 if name in ONE_THREAD else None
        command.add_argument(
            "--threads", type=_positive, default=threads, help=f"CPU threads [{threads or 'all'}]"
        )
        if name == "wire":
            command.add_argument(
                "--tensor-model-parallel-size",
                type=_positive,
                nargs="+",
                default=(2, 4, 8),
                help="sizes of the tensor-parallel group [2 4 8]",
            )
    options = parser.parse_args(argv)
    if options.what != "switch":
        options.preset = options.preset or DEFAULTS.get(options.what, "large")
        width = PRESETS[options.preset]["hidden_size"]
        rank = getattr(options, "rank", None)
        if rank and rank > width:
            linears = f"the MLP linears of {options.preset}"
            raise UserError(f"--rank {rank}: {linears} have rank {width} at most; lower it")
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: give 1 or more")
    return value
