"""What is compared with one process in FP32: rows of ``CASES`` on combinations of the engine's settings.

All legal combinations, and few of them that cover all pairs.
"""

import functools
import itertools
from collections.abc import Iterator

from inrank_megatron.config.checks import check
from inrank_megatron.errors import UserError
from tests.contract.cases import CASES, Tag, tagged
from tests.contract.layouts import LAYOUTS
from tests.contract.sessions import configuration

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
# product has; it keeps its state as its CPU Adam does. Apex has a stand-in here: `Tag.APEX`.
RARE = ("fused-adam", "apex-fused-adam")
FACTORS = {
    "method": tagged(Tag.PAIRWISE),
    "layout": LAYOUT_NAMES,
    "zero_stage": (1, 0, 2, 3),
    "optimizer": tuple(name for name in OPTIMIZERS if name not in RARE),
    "recompute": (False, True),
}
HALF = {**FACTORS, "method": tagged(Tag.HALF), "precision": ("bf16", "fp16")}
EVERYTHING = {
    **FACTORS,
    "method": tuple(CASES),
    "layout": (*LAYOUT_NAMES, "TP2 without SP"),
    "optimizer": tuple(OPTIMIZERS),
    "precision": ("fp32", "bf16", "fp16"),
}
ORTHOGONALISED = (
    ("TP2 SP", {}),
    ("DP2", {"zero_stage": 0}),
    ("DP2", {"zero_stage": 0, "precision": "bf16"}),
    ("DP2", {"zero_stage": 1, "precision": "bf16"}),
    ("DP2", {"zero_stage": 2, "precision": "fp16"}),
    ("DP2", {"zero_stage": 2, "optimizer": "adamw offloaded"}),
    ("DP2", {"zero_stage": 3, "optimizer": "adamw offloaded"}),
    ("TP2 SP DP2", {"zero_stage": 3}),
)
PLAIN = {"zero_stage": 1, "optimizer": "adamw", "recompute": False}

Comparison = dict[str, object]
"""A value of each factor: a row of ``CASES`` and what it is trained on."""


def comparisons() -> list[Comparison]:
    """Those of the suite, as the tags of each row ask for them."""
    return [*pairwise(FACTORS), *_single(), *pairwise(HALF, of="precision")]


def _single() -> Iterator[Comparison]:
    for name in CASES:
        if Tag.PAIRWISE not in CASES[name].tags:
            yield {"method": name, "layout": "TP2 SP DP2", **PLAIN}
    for name in tagged(Tag.WITHOUT_SP):
        yield {"method": name, "layout": "TP2 without SP", **PLAIN}
    for name in tagged(Tag.MORE_LAYOUTS):
        yield {"method": name, "layout": "TP2 SP separate", **PLAIN}
        yield {"method": name, "layout": "TP4 SP", **PLAIN}
    for name in tagged(Tag.ORTHOGONALISED):
        for layout, changes in ORTHOGONALISED:
            yield {"method": name, "layout": layout, **PLAIN, **changes}
    for name in tagged(Tag.APEX):
        apex = {"method": name, "layout": "DP2", **PLAIN, "optimizer": "apex-fused-adam"}
        yield from (apex | {"zero_stage": stage} for stage in (0, 1, 2))
        # DeepSpeed wraps it in another optimizer there than any other but its own.
        yield apex | {"zero_stage": 0, "precision": "bf16"}


def settings_of(comparison: Comparison) -> dict[str, object]:
    """Of the engine, over those of the row."""
    result = {"zero_stage": comparison["zero_stage"], **OPTIMIZERS[comparison["optimizer"]]}
    if comparison["recompute"]:
        result["recompute_granularity"] = "full"
    if comparison.get("precision", "fp32") != "fp32":
        result[comparison["precision"]] = True
    return result


def is_legal(comparison: Comparison) -> bool:
    """Whether the project accepts the combination, which does not depend on the method."""
    return _is_legal(comparison["layout"], tuple(settings_of(comparison).items()))


@functools.cache
def _is_legal(layout_name: str, settings: tuple) -> bool:
    layout = LAYOUTS[layout_name]
    config = configuration("dense", layout, **dict(settings))
    try:
        check(config, world_size=layout.world_size)
    except UserError:
        return False
    return True


def product(factors: dict[str, tuple]) -> Iterator[Comparison]:
    """Every legal combination."""
    for values in itertools.product(*factors.values()):
        combination = dict(zip(factors, values, strict=True))
        if is_legal(combination):
            yield combination


def pairwise(factors: dict[str, tuple], *, of: str | None = None) -> list[Comparison]:
    """Combinations in which every two values that are legal together meet, chosen greedily.

    ``of``: only the pairs that hold a value of this factor, where the others meet elsewhere.
    """
    combinations = list(product(factors))
    pairs = [
        {pair for pair in itertools.combinations(combination.items(), 2) if of is None or of in dict(pair)}
        for combination in combinations
    ]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(combinations)), key=lambda index: len(missing & pairs[index]))
        missing -= pairs[best]
        chosen.append(combinations[best])
    return chosen


def name_of(comparison: Comparison) -> str:
    return "/".join(
        f"ZeRO {v}" if k == "zero_stage" else "recompute" if v is True else str(v)
        for k, v in comparison.items()
        if v is not False
    )
