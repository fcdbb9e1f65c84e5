"""The engine's settings that every method runs on: all legal combinations, and few of them that cover all
pairs.
"""

import functools
import itertools
from collections.abc import Iterator

from inrank_megatron.config.checks import check
from inrank_megatron.errors import UserError
from tests.contract.sessions import LAYOUTS, METHODS, configuration

LAYOUT_NAMES = ("TP1 DP1", "TP2 SP", "DP2", "TP2 SP DP2")
# Each with the memory that it steps on.
OPTIMIZERS = {
    "adamw": {},
    "adamw offloaded": {"offload_optimizer": True},
    "cpu-adam offloaded": {"optimizer": "cpu-adam", "offload_optimizer": True},
    "sgd": {"optimizer": "sgd"},
    "fused-adam": {"optimizer": "fused-adam"},
    "apex-fused-adam": {"optimizer": "apex-fused-adam"},
}
# DeepSpeed's fused Adam is for GPUs. Its operator compiles on a CPU too, in a minute that only the full
# product has; it keeps its state as its CPU Adam does. Apex has a stand-in here, worth a case a stage.
RARE = ("fused-adam", "apex-fused-adam")
# Rows that differ from others in what is decided or drawn alone, which happens once: one case for each is
# enough.
ONCE = (
    "fixed-rank-random",
    "fixed-rank-attention",
    "lora-attention",
    "inrank-random",
    "inrank-kaiming",
    "inrank-efficient-default-start",
    "llama-dense",
    "llama-lora",
    "llama-inrank",
    "llama-warm-start",
    "llama-fixed-rank",
    "inrank-efficient-eq7",
    "inrank-efficient-preset-released",
    "inrank-efficient-patience",
    "inrank-efficient-refound",
    "inrank-efficient-paper",
    "warm-start-budget",
)
FACTORS = {
    "method": tuple(name for name in METHODS if name not in ONCE),
    "layout": LAYOUT_NAMES,
    "zero_stage": (1, 0, 2, 3),
    "optimizer": tuple(name for name in OPTIMIZERS if name not in RARE),
    "recompute": (False, True),
}
HALF = {
    **FACTORS,
    "method": (
        "dense",
        "fixed-rank",
        "lora",
        "relora",
        "inrank-efficient",
        "inrank",
        "inrank-efficient-fisher",
        "llama-relora",
        "warm-start",
    ),
    "precision": ("bf16", "fp16"),
}

Case = dict[str, object]


def changes(case: Case) -> dict[str, object]:
    """The settings of a case, over those of its method."""
    result = {"zero_stage": case["zero_stage"], **OPTIMIZERS[case["optimizer"]]}
    if case["recompute"]:
        result["recompute_granularity"] = "full"
    if case.get("precision", "fp32") != "fp32":
        result[case["precision"]] = True
    return result


def is_legal(case: Case) -> bool:
    """Whether the project accepts the combination, which does not depend on the method."""
    return _is_legal(case["layout"], tuple(changes(case).items()))


@functools.cache
def _is_legal(layout_name: str, settings: tuple) -> bool:
    layout = LAYOUTS[layout_name]
    config = configuration("dense", layout, **dict(settings))
    try:
        check(config, world_size=layout.world_size)
    except UserError:
        return False
    return True


def product(factors: dict[str, tuple]) -> Iterator[Case]:
    """Every legal combination."""
    for values in itertools.product(*factors.values()):
        case = dict(zip(factors, values, strict=True))
        if is_legal(case):
            yield case


def pairwise(factors: dict[str, tuple], *, of: str | None = None) -> list[Case]:
    """Combinations in which every two values that are legal together meet, chosen greedily.

    ``of``: only the pairs that hold a value of this factor, where the others meet elsewhere.
    """
    cases = list(product(factors))
    pairs = [
        {pair for pair in itertools.combinations(case.items(), 2) if of is None or of in dict(pair)}
        for case in cases
    ]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cases)), key=lambda index: len(missing & pairs[index]))
        missing -= pairs[best]
        chosen.append(cases[best])
    return chosen


def once() -> list[Case]:
    """One case for each row, and for the layout and the optimizer, that needs no more."""
    common = {"zero_stage": 1, "optimizer": "adamw", "recompute": False}
    cases = [{"method": name, "layout": "TP2 SP DP2", **common} for name in ONCE]
    # Without sequence parallelism layers have other collectives: with W0, without it, dense, and LLaMA's.
    apart = ("dense", "inrank-efficient", "llama-inrank-efficient")
    cases += [{"method": name, "layout": "TP2 without SP", **common} for name in apart]
    apex = common | {"method": "inrank-efficient", "layout": "DP2", "optimizer": "apex-fused-adam"}
    cases += [apex | {"zero_stage": stage} for stage in (0, 1, 2)]
    # DeepSpeed wraps it in another optimizer there than any other but its own.
    return [*cases, apex | {"zero_stage": 0, "precision": "bf16"}]


def name_of(case: Case) -> str:
    return "/".join(
        f"ZeRO {v}" if k == "zero_stage" else "recompute" if v is True else str(v)
        for k, v in case.items()
        if v is not False
    )
