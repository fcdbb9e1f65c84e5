"""One case of the engine's settings against one process in FP32."""

import functools

from inrank_megatron.lowrank.methods.changes import Change
from tests.contract.sessions import LAYOUTS, METHODS, run
from tests.contract.settings import Case, changes
from tests.harness import run_ranks

STEPS = 50
"""Checks come every 5 steps, the switch after 20, restarts every 10."""

FEWER = {
    name: 15 if settings["method"] in ("dense", "fixed-rank", "lora") else 25
    for name, settings in METHODS.items()
}
FEWER["inrank"] = 20
"""Steps of most of the suite's cases: past every change that the method makes."""

SGD_RATE = 0.1
"""Adam moves every weight by about its learning rate; SGD needs a larger one to learn in so few steps."""

TOLERANCES = {"fp32": (2e-6, 3e-5, 0), "bf16": (1e-3, 3e-2, 1), "fp16": (2e-4, 1e-2, 1)}
"""Largest relative difference of a loss and of a gradient norm, largest difference of a rank. In FP32 only
rounding differs. BF16 keeps 8 bits (4e-3 a value) and FP16 11 (5e-4); the mean over a batch's 128 tokens and
the FP32 masters average that. A rank is where an explained ratio crosses the threshold, and spectra of
weights that differ by rounding may cross it one column apart.
"""

LARGE_START = (1e-5, 3e-4, 0)
"""The same in FP32 for columns that start at the default norm of 0.5. Beside weights of width 64 their
products are large, and so is the rounding of what is computed from them.
"""


@functools.cache
def serial(method: str, sgd: bool) -> dict:
    """One process, FP32, ZeRO 1, without offload or recomputation."""
    return _serial(method, sgd, STEPS)


def _serial(method: str, sgd: bool, steps: int, given: list[list[Change]] | None = None) -> dict:
    settings = {"optimizer": "sgd", "lr": SGD_RATE} if sgd else {}
    return run_ranks(run, 1, method, LAYOUTS["TP1 DP1"], settings, steps, given, timeout=240)[0]


def compare(case: Case, steps: int = STEPS) -> dict:
    """The largest differences over steps and ranks, and whether they are within the tolerances.

    Where the case's ranks are others than the serial training's, its losses and norms are compared with those
    of a serial training that carries out the case's own changes.
    """
    method, layout, settings = case["method"], LAYOUTS[case["layout"]], changes(case)
    sgd = case["optimizer"] == "sgd"
    if sgd:
        settings["lr"] = SGD_RATE
    results = run_ranks(run, layout.world_size, method, layout, settings, steps, timeout=400)
    reference = serial(method, sgd)
    rank = max(rank_difference(result["ranks"], reference["ranks"][:steps]) for result in results)
    if rank:
        reference = _serial(method, sgd, steps, results[0]["changes"])
        assert all(result["ranks"] == reference["ranks"] for result in results)
    loss, norm = (
        max(largest_difference(result[key], reference[key][:steps]) for result in results)
        for key in ("losses", "grad_norms")
    )
    precision = case.get("precision", "fp32")
    large = (method, precision) == ("inrank-efficient-default-start", "fp32")
    limits = LARGE_START if large else TOLERANCES[precision]
    return {
        "loss": loss,
        "grad_norm": norm,
        "rank": rank,
        "passed": loss < limits[0] and norm < limits[1] and rank <= limits[2],
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
