"""One comparison with the training of one process in FP32."""

import functools

from inrank_megatron.lowrank.methods.changes import Change
from tests.contract.cases import CASES, STEPS, Tag, Tolerance
from tests.contract.comparisons import Comparison, settings_of
from tests.contract.layouts import LAYOUTS
from tests.contract.sessions import run
from tests.harness import run_ranks

SGD_RATE = 0.1
"""Adam moves every weight by about its learning rate; SGD needs a larger one to learn in so few steps."""

HALF = {"bf16": Tolerance(1e-3, 3e-2, 1), "fp16": Tolerance(2e-4, 1e-2, 1)}
"""BF16 keeps 8 bits (4e-3 per value) and FP16 11 (5e-4); the mean over a batch's 128 tokens and the FP32
master weights average that. A rank is where an explained ratio crosses the threshold, and spectra of weights
that differ by rounding may cross it one column apart.
"""


def steps_of(comparison: Comparison) -> int:
    """In the suite: all 50 on one layout for rows tagged ``LONG``, elsewhere in the full product alone."""
    case = CASES[comparison["method"]]
    long = Tag.LONG in case.tags and "precision" not in comparison and comparison["layout"] == "TP2 SP"
    return STEPS if long else case.steps


def reference(method: str, sgd: bool = False, *, least: int = 0) -> dict:
    """What comparisons of a method share: one process, FP32, ZeRO 1, without offload or recomputation; of all
    50 steps where one of them takes so many, of the ``least`` that are asked for elsewhere.
    """
    case = CASES[method]
    return _reference(method, sgd, STEPS if Tag.LONG in case.tags else max(least, case.steps))


@functools.cache
def _reference(method: str, sgd: bool, steps: int) -> dict:
    return _serial(method, sgd, steps)


def _serial(method: str, sgd: bool, steps: int, given: list[list[Change]] | None = None) -> dict:
    settings = {"optimizer": "sgd", "lr": SGD_RATE} if sgd else {}
    return run_ranks(run, 1, method, LAYOUTS["TP1 DP1"], settings, steps, given, timeout=240)[0]


def compare(comparison: Comparison, steps: int = STEPS) -> dict:
    """The largest differences over steps and ranks, and whether they are within the tolerances.

    Where the ranks differ from the serial training's, losses and norms are compared with those of a serial
    training that carries out the comparison's own changes.
    """
    method, layout, settings = comparison["method"], LAYOUTS[comparison["layout"]], settings_of(comparison)
    sgd = comparison["optimizer"] == "sgd"
    if sgd:
        settings["lr"] = SGD_RATE
    results = run_ranks(run, layout.world_size, method, layout, settings, steps, timeout=400)
    serial = reference(method, sgd, least=steps)
    rank = max(rank_difference(result["ranks"], serial["ranks"][:steps]) for result in results)
    if rank:
        serial = _serial(method, sgd, steps, results[0]["changes"])
        assert all(result["ranks"] == serial["ranks"] for result in results)
    loss, norm = (
        max(largest_difference(result[key], serial[key][:steps]) for result in results)
        for key in ("losses", "grad_norms")
    )
    limits = HALF.get(comparison.get("precision"), CASES[method].tolerance)
    return {
        "loss": loss,
        "grad_norm": norm,
        "rank": rank,
        "passed": loss < limits.loss and norm < limits.grad_norm and rank <= limits.rank,
    }


def largest_difference(values: list[float], reference: list[float]) -> float:
    """Relative, over the steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, reference, strict=True))


def rank_difference(history: list[dict], reference: list[dict]) -> int:
    """The largest of a layer at a step."""
    return max(
        (
            abs(ranks[name] - expected[name])
            for ranks, expected in zip(history, reference, strict=True)
            for name in expected
        ),
        default=0,
    )
