"""ReLoRA (arXiv 2307.05695): spectra of what dense training, LoRA and ReLoRA add to one W_0; ablation."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from torch import Tensor, nn

from inrank_megatron.experiments.found import Found, Record, rounded
from inrank_megatron.experiments.small_runs import SmallRuns, perplexity_of
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.formats import read_weights
from inrank_megatron.interop.huggingface.dense import dense_tensors
from inrank_megatron.reporting.plots import BLUE, GREEN, GREY, VERMILION, styled
from inrank_megatron.reporting.run import Run
from inrank_megatron.spectra.recorder import SpectrumRecorder

STEPS, RANK, NEARLY_UNTRAINED = 160, 8, 5
LINEARS = {
    "attention.q": "attn.c_attn",
    "attention.k": "attn.c_attn",
    "attention.v": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
"""The linears of a block, and the matrix of GPT-2 in transformers that holds each."""


@dataclass(frozen=True)
class Arm:
    """A run: of ``steps`` shares of the whole, from the weights of the run ``start``."""

    name: str
    flags: str
    start: str = "base"
    share: float = 1.0


LORA = f"--method lora --rank {RANK} --factorised-linears mlp-attention --qkv-factors separate"
# {interval}: a quarter of the steps, {rising}: a fifth of that, {often}: a tenth, {rising_often}: its quarter
RELORA = LORA.replace("lora", "relora", 1) + " --relora-interval {interval} --relora-warmup-iters {rising}"
NO_RESET = "--relora-reset random --relora-reset-share 1e-9"  # the probability of each entry's reset
ARMS = [
    Arm("dense", "--method dense"),
    Arm("LoRA", LORA),
    Arm("ReLoRA", RELORA),
    Arm("ReLoRA, no reset", f"{RELORA} {NO_RESET}"),
    Arm("ReLoRA, no jagged schedule", f"{RELORA} --relora-warmup-iters 0"),
    Arm("ReLoRA, frequent", f"{RELORA} --relora-interval {{often}} --relora-warmup-iters {{rising_often}}"),
    Arm("warm start", "--method dense --lr-decay-style constant", share=0.25),
    Arm("warm start, LoRA", LORA, start="warm start", share=0.75),
    Arm("warm start, ReLoRA", RELORA, start="warm start", share=0.75),
]
SHOWN = {"dense": GREY, "LoRA": VERMILION, "ReLoRA": BLUE, "ReLoRA, frequent": GREEN}


def measure(*, quick: bool, notify: Callable[[str], None]) -> Found:
    """Every arm, one seed; quick: dense, LoRA and ReLoRA, a quarter of the steps."""
    steps, arms = (STEPS // 4, ARMS[:3]) if quick else (STEPS, ARMS)
    with tempfile.TemporaryDirectory() as folder:
        return study(arms, SmallRuns(Path(folder), notify), steps=steps)


def study(arms: Sequence[Arm], runs: SmallRuns, *, steps: int) -> Found:
    """Train a dense run of a few steps, W_0, and from it every arm; rows and the spectra of the last step."""
    found, interval = Found([], []), steps // 4
    often = max(2, interval // 10)
    sizes = {"interval": interval, "rising": interval // 5, "often": often, "rising_often": often // 4}
    runs.train("base", "--method dense --lr-warmup-iters 0", steps=NEARLY_UNTRAINED)
    for arm in arms:
        start = runs.folder / _folder(arm.start)
        flags = f"{arm.flags.format(**sizes)} --min-lr 0 --pretrained-checkpoint {start}"
        run = runs.train(_folder(arm.name), flags, steps=round(steps * arm.share))
        record(found, arm, run, start=start)
    return found


def record(found: Found, arm: Arm, run: Run, *, start: Path) -> None:
    """A row and the points of each linear: of its spectra after the last step, against the run ``start``."""
    about = {"arm": arm.name, "start": arm.start, "test_perplexity": round(perplexity_of(run), 2)}
    spectra = update_spectra(start, run.folder, step=run.last_step)
    for matrix in LINEARS:
        own = [values for (name, _), values in spectra.items() if name == matrix]
        found.rows.append(about | {"matrix": matrix} | summarised(own))
        found.curves.append({"arm": arm.name, "matrix": matrix, "values": rounded(own[0])})


def _folder(arm: str) -> str:
    return arm.replace(", ", "-").replace(" ", "_")


def update_spectra(start: Path, end: Path, *, step: int) -> dict[tuple[str, int], list[float]]:
    """By linear and block, the singular values of ``W_t - W_0``, both with their factors multiplied out."""
    matrices = _matrices(start)
    model = nn.ParameterDict({_key(name): nn.Parameter(value) for name, value in matrices.items()})
    recorder = SpectrumRecorder(model)
    for name, value in _matrices(end).items():
        model[_key(name)].data.copy_(value)
    rows = {row["layer"]: row["values"] for row in recorder.record(step)}
    return {name: rows[_key(name)] for name in matrices}


def _key(name: tuple[str, int]) -> str:
    return f"{name[0]} {name[1]}".replace(".", " ")


def _matrices(run: Path) -> dict[tuple[str, int], Tensor]:
    """The linears of the newest checkpoint, by kind and block, FP32; query, key and value apart."""
    checkpoint = max((run / "checkpoints").glob("step_*"))
    _, weights = read_weights(checkpoint, Options())
    _, tensor = dense_tensors(weights)
    found = {}
    for block in range(weights.config.model.num_layers):
        for kind, module in LINEARS.items():
            matrix = tensor(f"transformer.h.{block}.{module}.weight")
            if kind[-2:] in (".q", ".k", ".v"):
                matrix = matrix.chunk(3, dim=1)["qkv".index(kind[-1])]
            found[kind, block] = matrix.clone()
    return found


def summarised(spectra: Sequence[Sequence[float]]) -> Record:
    """Three numbers of a kind of matrix, each the mean over the blocks.

    ``above_1_percent``, ``above_10_percent``: singular values above that part of the largest.
    ``effective_rank``: the exponential of the entropy of the singular values divided by their sum
    (Roy and Vetterli, 2007).
    """
    return {
        "above_1_percent": fmean(sum(value > 0.01 * one[0] for value in one) for one in spectra),
        "above_10_percent": fmean(sum(value > 0.1 * one[0] for value in one) for one in spectra),
        "effective_rank": round(fmean(effective_rank(one) for one in spectra), 2),
    }


def effective_rank(values: Sequence[float]) -> float:
    """``exp(-sum p log p)`` with ``p = values / sum``: 1 for one direction, n for n equal ones."""
    total = sum(values)
    shares = [value / total for value in values if value > 0]
    return math.exp(-sum(share * math.log(share) for share in shares))


def draw(curves: Sequence[Record]) -> Figure:
    """The last spectra of the first block, a panel for each linear, over their largest value."""
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    grid = figure.subplots(2, 3)
    for panel, matrix in zip(grid.flat, LINEARS, strict=True):
        for arm, colour in SHOWN.items():
            for point in curves:
                if (point["arm"], point["matrix"]) == (arm, matrix):
                    values = point["values"]
                    panel.plot(
                        range(1, len(values) + 1), [value / values[0] for value in values],
                        color=colour, linewidth=1.4, label=arm,
                    )  # fmt: skip
        panel.axhline(0.1, color=GREY, linewidth=0.8, linestyle=":")
        panel.set_yscale("log")
        panel.set_ylim(1e-3, 1.2)
        styled(panel, x="index", y="singular value over the largest", title=matrix)
    lines = grid[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=len(SHOWN), frameon=False, fontsize=8)
    figure.suptitle("ReLoRA: $W_t - W_0$ after the last step, first block", fontsize=10)
    return figure
