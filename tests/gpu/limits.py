"""What a figure may be, and why.

Parity. The oracle is the same training on the CPU in FP32 by one process. The limits are those of
``contract/compare.py``, which the CPU's own layouts keep, times a margin for another device:

- FP32: layouts of CPU ranks differ by up to 2e-6 in a loss and 3e-5 in a norm, because sums have another
  order. A GPU also has other approximations of exp, erf and rsqrt, an ulp or two each, so 1e-4 and 1e-3. TF32
  (10 bits) would pass as noise in a loss; the layers' limit sees it.
- BF16 and FP16 are compared with FP32 as well, not with half precision on a CPU: the rounding of that is as
  large as what is to be judged. A GPU may add partial sums in half precision, so twice the CPU's limits.

A rank is where an explained ratio crosses the threshold; spectra of weights that differ by rounding may cross
it one column apart. The oracle then carries out the case's own changes, and the losses are compared with
those.
"""

import re
from dataclasses import dataclass

LOSS = {"fp32": 1e-4, "bf16": 2e-3, "fp16": 5e-4}
NORM = {"fp32": 1e-3, "bf16": 6e-2, "fp16": 2e-2}
RANK = 1

LAYER = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
"""Of the first step, where no optimizer amplifies anything: norm of a tensor's difference over its norm; FP64
over all 20 steps, largest entry. Rounding of FP32 is 6e-8 a product and that of TF32 5e-4, so TF32 would
fail; BF16 rounds by 4e-3, FP16 by 5e-4, and several roundings lie between input and gradient.
"""
LOGITS = 2e-5
PROGRAM_LOSS = 1e-4
PERPLEXITY = 1e-4
RESUMED_LOSS = 1e-5
"""Sums of the backward pass may come in another order each time; the deterministic mode keeps it."""

WAITS_BEFORE_THE_STEP, WAITS_OF_A_STEP = 0, 1


@dataclass(frozen=True)
class Bound:
    """A limit on the rows of a benchmark whose case and quantity match.

    Args:
        field: ``gap`` (measured over its own limit), ``dense`` (over the dense layer's), or ``measured``.
        timed: a time, which a rehearsal does not judge.
    """

    what: str
    case: str
    quantity: str
    field: str
    limit: float
    timed: bool = False


EXACT = 1 + 1e-9
BOUNDS = (
    Bound("wire", "phase", "^(activation|parameter|total) elements$", "gap", EXACT),
    Bound("memory", "", "^(parameter|gradient|master and moment) bytes$", "gap", EXACT),
    Bound("memory", "", "^activation bytes$", "gap", 1.05),
    Bound("memory", "phase", "^total bytes$", "dense", 1.0),
    # The second phase is there to be faster, the first must not cost what it saves in memory.
    Bound("layer", "phase-2", "^seconds", "dense", 1.0, timed=True),
    Bound("layer", "phase-1", "^seconds", "dense", 1.2, timed=True),
    Bound("step", "phase-2", "^seconds", "dense", 1.0, timed=True),
    Bound("step", "phase-1", "^seconds", "dense", 1.2, timed=True),
    Bound("rank-decisions", "", "^rank decided", "gap", EXACT),
    Bound("rank-decisions", "", "^percent of training time", "measured", 1.0, timed=True),
    Bound("switch", "", "^truncation error", "gap", 1.001),
    Bound("switch", "", "^seconds on a node", "gap", 1.0, timed=True),
)
"""Those of times are targets: no GPU has been measured. A figure that none matches is shown for itself."""


def bound_of(what: str, row: dict) -> Bound | None:
    """The first that matches a row of `tools/bench.py WHAT --json`, and has a figure to judge."""
    for bound in BOUNDS:
        if (
            bound.what == what
            and re.search(bound.case, row["case"])
            and re.search(bound.quantity, row["quantity"])
            and value_of(bound, row) is not None
        ):
            return bound
    return None


def value_of(bound: Bound, row: dict) -> float | None:
    """The figure of a row that is judged."""
    if bound.field == "gap":
        return row["measured"] / row["limit"] if row["limit"] else None
    return row["ratio_vs_dense"] if bound.field == "dense" else row["measured"]
