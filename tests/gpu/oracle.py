"""The serial CPU oracle: one process with CUDA hidden, which judges what the ranks of a case returned."""

import functools
import shutil
from pathlib import Path

import torch

from inrank_megatron.config.loading import to_yaml
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.megatron import checkpoint as megatron
from tests.contract.compare import largest_difference, rank_difference
from tests.distributed import layer_parity, megatron_folders
from tests.distributed.gpt_parity import VOCABULARY, configuration
from tests.gpu import limits
from tests.gpu.cases import SIZES
from tests.gpu.figures import Figure
from tests.gpu.ranks import layer_case, optimizer_of, serial


def losses(rank: int, world_size: int, settings: dict, results: list[dict]) -> list[Figure]:
    """Every rank's losses and norms next to those of the serial training, which follows the case's ranks
    where they are others than its own.
    """
    changes = settings["changes"]
    precision = next((name for name in ("bf16", "fp16") if changes.get(name)), "fp32")
    later = settings.get("overlap", False)
    reference = _serial(settings["method"], tuple(_sizes(changes).items()), later)
    difference = max(rank_difference(result["ranks"], reference["ranks"]) for result in results)
    agree = all(result["ranks"] == results[0]["ranks"] for result in results)
    if difference:
        reference = serial(settings["method"], _sizes(changes), results[0]["changes"])
    loss, norm = (
        max(largest_difference(result[key], reference[key]) for result in results)
        for key in ("losses", "grad_norms")
    )
    return [
        Figure("largest relative difference of a loss", loss, limits.LOSS[precision]),
        Figure("largest relative difference of a gradient norm", norm, limits.NORM[precision]),
        Figure("largest difference of a rank", difference, limits.RANK),
        Figure("ranks that disagree among the processes", int(not agree), 0),
    ]


def layer(rank: int, world_size: int, settings: dict, results: list[dict]) -> list[Figure]:
    """Outputs, gradients and values next to those of the serial layer in FP64."""
    case = layer_case(settings)
    expected = layer_parity.train_oracle(layer_case(settings | {"dtype": "float64"}), optimizer_of(settings))
    merged = layer_parity.merge(results, case)
    if case.dtype is torch.float64:
        differences = [(merged[key] - expected[key]).abs().max().item() for key in expected]
        name = "largest difference in 20 steps"
    else:
        first = [key for key in expected if key.startswith("0 ")]
        differences = [_relative(merged[key], expected[key]) for key in first]
        name = "largest relative difference in the first step"
    return [Figure(name, _largest(differences), limits.LAYER[settings["dtype"]])]


def tiles(rank: int, world_size: int, settings: dict, results: list) -> list[Figure]:
    """Zeros that fill a tile change nothing, to the bit."""
    [widths] = {tuple(widths) for widths, _ in results}
    different = sum(
        not torch.equal(one, other) or not one.any()
        for _, (tiled, exact) in results
        for one, other in zip(tiled, exact, strict=True)
    )
    return [
        Figure("tensors that whole tiles change", different, 0),
        Figure("columns missing from a tile of 8", abs(8 - widths[0]), 0),
    ]


def megatron_checkpoints(rank: int, world_size: int, settings: dict, results: list[dict]) -> list[Figure]:
    """What Megatron-Core saved is read whole, to the bit; what it loaded computes as the model on the CPU."""
    folder = Path(results[0]["folder"])
    try:
        description = folder / "model.yaml"
        description.write_text(to_yaml(configuration(1, **settings)))
        options = Options(model_config=description, vocab_size=VOCABULARY)
        weights = megatron.open_weights(folder / "saved", options)
        saved = results[0]["saved"]
        wrong = sum(not torch.equal(weights.read(name), tensor) for name, tensor in saved.items())
    finally:
        shutil.rmtree(folder)
    expected = megatron_folders.gpt_forward(megatron_folders.drawn(configuration(1, **settings), None))
    logits = expected(megatron_folders.sample()[0])
    difference = _largest([(result["logits"] - logits).abs().max().item() for result in results])
    return [
        Figure("tensors saved by Megatron-Core that are read wrong", wrong, 0),
        Figure("largest difference of a logit after Megatron-Core's load", difference, limits.LOGITS),
    ]


def counts(rank: int, world_size: int, settings: dict, results: list[dict]) -> list[Figure]:
    """The most of any rank."""
    allowed = {
        "waits before the step": limits.WAITS_BEFORE_THE_STEP,
        "waits of the step": limits.WAITS_OF_A_STEP,
    }
    return [
        Figure(f"{name}, {phase}", max(result[phase][name] for result in results), allowed.get(name))
        for phase, found in results[0].items()
        for name in found
    ]


@functools.cache
def _serial(method: str, sizes: tuple, later: bool) -> dict:
    return serial(method, dict(sizes), later=later)


def _sizes(changes: dict) -> dict:
    """Of the settings those that the serial training has too, so that cases share it."""
    return {name: changes[name] for name in SIZES}


def _largest(values: list[float]) -> float:
    """NaN if there is one, which ``max`` may pass over."""
    return torch.tensor(values, dtype=torch.float64).max().item()


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


CHECKS = {
    "losses": losses,
    "rank checks": losses,
    "layer": layer,
    "tiles": tiles,
    "megatron": megatron_checkpoints,
    "counts": counts,
}
