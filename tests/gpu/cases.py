"""What `tests/gpu.sh` does on a machine: a list of cases, each with its ranks and settings.

The list needs no torch.
"""

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from inrank_megatron.benchmarks.command import NOTES, TIMED

PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}
METHODS = (
    "inrank-efficient",
    "dense",
    "fixed-rank",
    "lora",
    "relora",
    "inrank",
    "warm-start",
    "llama-inrank-efficient",
)
"""Rows of ``contract/cases.py``: every method, and LLaMA with factors in attention and recomputation."""
SIZES = {"global_batch_size": 16, "num_attention_heads": 8}
"""Of the sessions here: they divide over eight ranks either way."""
ACCUMULATION = 2
MOST_OF_A_LAYER = 4
"""Ranks that the widths of the layers and models in ``distributed/`` divide by."""


@dataclass(frozen=True)
class Case:
    """One thing to check or to measure.

    Args:
        name: path-like; ``--only losses/TP2`` names all below it.
        kind: the function that runs it, in ``ranks.py`` or, for programs, in ``programs.py``.
        ranks: processes, each with its own GPU; 0 for programs, which start their own.
        limit_seconds: after them it counts as hung.
    """

    name: str
    kind: str
    ranks: int
    settings: dict = field(default_factory=dict)
    limit_seconds: int = 90


def cases(gpus: int, *, memory_gib: float, rehearse: bool) -> list[Case]:
    """All of a machine, the most telling first.

    Args:
        gpus: that are used: 1, 2, 4 or 8.
        memory_gib: of the smallest of them: how large a model the measurements take.
        rehearse: on the CPU: the smallest model, measured once.
    """
    losses = list(_losses(gpus))
    first = [case for case in losses if case.settings["method"] == METHODS[0]]
    return [
        Case("start/one process with a store in memory", "hash_store", 0),
        *_layers(min(gpus, MOST_OF_A_LAYER)),
        *first,
        *_programs(gpus),
        *_counts(gpus),
        *_benchmarks(memory_gib, rehearse),
        *_optimizers(gpus, rehearse),
        *_rank_checks(gpus),
        *(case for case in losses if case not in first),
    ]


def chosen(all_cases: Iterable[Case], patterns: list[str]) -> list[Case]:
    """Those that a pattern names: a name, the beginning of a path, or a shell pattern; all without any."""
    return [
        case
        for case in all_cases
        if not patterns
        or any(
            case.name == pattern or case.name.startswith(f"{pattern}/") or fnmatch.fnmatch(case.name, pattern)
            for pattern in patterns
        )
    ]


def layouts(gpus: int) -> dict[str, dict]:
    """The ways in which all the GPUs can share a training, as arguments of ``Layout``."""
    found = {}
    for tensor in (1, 2, 4, 8):
        if gpus % tensor == 0:
            data = f" DP{gpus // tensor}" if gpus > tensor else ""
            found[f"TP{tensor}{data}"] = {"world_size": gpus, "tensor_parallel": tensor}
    return found


def _losses(gpus: int) -> Iterator[Case]:
    """Every method on every layout, ZeRO stage and precision that may stand together."""
    for layout, ranks in layouts(gpus).items():
        for stage in range(4):
            for precision, settings in PRECISIONS.items():
                # The rules of docs/reference/combinations.md.
                if stage == 0 and (
                    precision == "fp16" or (precision == "bf16" and ranks["tensor_parallel"] > 1)
                ):
                    continue
                for method in METHODS:
                    yield _session(f"{layout}/ZeRO {stage}/{precision}", method, ranks, stage, settings)
    if gpus > 1:
        ranks = {"world_size": gpus, "tensor_parallel": 2, "sequence_parallel": False}
        yield _session("TP2 without SP/ZeRO 1/fp32", METHODS[0], ranks, 1, {})


def _optimizers(gpus: int, rehearse: bool) -> Iterator[Case]:
    """Other optimizers, data-parallel. DeepSpeed compiles two of them at their first use, which no rehearsal
    waits for.
    """
    ranks = {"world_size": gpus, "tensor_parallel": 1}
    fused, on_host = {"optimizer": "fused-adam"}, {"optimizer": "cpu-adam", "offload_optimizer": True}
    rows = [("adamw offloaded", 2, "fp32", {"offload_optimizer": True})]
    if not rehearse:
        rows += [("fused-adam", 0, "bf16", fused), ("fused-adam", 3, "fp32", fused)]
        rows += [("fused-adam", 1, "fp32", fused), ("fused-adam", 2, "bf16", fused)]
        rows += [("cpu-adam", stage, "bf16", on_host) for stage in (1, 2, 3)]
        rows += [("cpu-adam", stage, "fp32", on_host) for stage in (1, 3)]
    for name, stage, precision, settings in rows:
        where = f"{name}/ZeRO {stage}/{precision}"
        yield _session(where, METHODS[0], ranks, stage, settings | PRECISIONS[precision], limit=220)


def _rank_checks(gpus: int) -> Iterator[Case]:
    """Checks that a thread of the host computes during the next step, and those that a step waits for."""
    ranks = {"world_size": gpus, "tensor_parallel": min(gpus, 2)}
    for overlap, stage, precision in ((True, 1, "fp32"), (True, 3, "bf16"), (False, 1, "fp32")):
        where = f"{'overlapping' if overlap else 'awaited'} rank checks/ZeRO {stage}/{precision}"
        session = _session(where, METHODS[0], ranks, stage, PRECISIONS[precision])
        yield replace(session, kind="rank checks", settings=session.settings | {"overlap": overlap})


def _session(where: str, method: str, layout: dict, stage: int, settings: dict, limit: int = 90) -> Case:
    data_parallel = layout["world_size"] // layout["tensor_parallel"]
    micro_batch = SIZES["global_batch_size"] // (ACCUMULATION * data_parallel)
    changes = {**SIZES, "micro_batch_size": micro_batch, "zero_stage": stage, **settings}
    given = {"method": method, "layout": layout, "changes": changes}
    return Case(f"losses/{where}/{method}", "losses", layout["world_size"], given, limit)


def _layers(ranks: int) -> Iterator[Case]:
    """Column and row, with and without W0, in each precision, sharded over at most four ranks."""
    for row in (False, True):
        for frozen_base in (False, True):
            name = f"{'row' if row else 'column'} {'W0 + U V' if frozen_base else 'U V'}"
            shape = {"row": row, "frozen_base": frozen_base, "bias": True, "sequence_parallel": ranks > 1}
            for dtype in ("float64", "float32", "bfloat16", "float16"):
                yield Case(f"layers/TP{ranks}/{dtype}/{name}", "layer", ranks, {**shape, "dtype": dtype})
            for dtype in ("bfloat16", "float16"):
                yield Case(
                    f"layers/TP{ranks}/tiles {dtype}/{name}", "tiles", ranks, {**shape, "dtype": dtype}
                )
    for model in ("gpt2", "llama"):
        yield Case(f"layers/Megatron's torch_dist/{model}", "megatron", ranks, {"model_type": model})


def _programs(gpus: int) -> Iterator[Case]:
    """The main program and the tools, as a user starts them."""
    for model in ("gpt2", "llama"):
        for what in ("train", "resume", "resume elsewhere", "evaluate", "generate", "convert"):
            given = {"model": model, "gpus": gpus, "what": what}
            yield Case(f"programs/{model}/{what}", "program", 0, given, 240)
    for precision in ("fp32", "bf16"):
        given = {"gpus": gpus, "precision": precision}
        yield Case(f"programs/deterministic mode/{precision}", "repeat", 0, given, 280)
    yield Case("programs/deepspeed bf16", "deepspeed", 0, {"gpus": gpus}, 240)


def _counts(gpus: int) -> Iterator[Case]:
    """Launches and waits of one step, by torch's profiler."""
    ranks = {"world_size": gpus, "tensor_parallel": min(gpus, 2)}
    for precision in ("bf16", "fp32"):
        session = _session("", METHODS[0], ranks, 1, PRECISIONS[precision])
        yield Case(f"counts/ZeRO 1/{precision}", "counts", gpus, session.settings)
    session = _session("", "dense", ranks, 1, PRECISIONS["bf16"])
    yield Case("counts/ZeRO 1/bf16 dense", "counts", gpus, session.settings)


def _benchmarks(memory_gib: float, rehearse: bool) -> Iterator[Case]:
    """`tools/bench.py`; `step` on the largest model whose four engines fit (18 bytes per parameter each)."""
    step = "large" if memory_gib >= 75 else "medium" if memory_gib >= 36 else "small"
    presets = {"step": step, "counts": "tiny"}
    for what in NOTES:
        arguments = [what, "--preset", "tiny" if rehearse else presets.get(what, "large")]
        if what in TIMED:
            arguments += ["--repeats", "1" if rehearse else "9"]
        yield Case(f"measured/{what}", "bench", 0, {"arguments": arguments, "judge_times": not rehearse}, 280)
