"""What AdamW, Muon, Spectron and LoRA-Muon cost in a training step: operations, state, time.

On one rank, which orthogonalises everything; of several replicas each does its share. ``beyond AdamW``:
operations of matrix products that the step has beyond AdamW's, over those of AdamW's step; ``limit`` is the
formula of the plan. A step has the micro-batch that ``case`` names; the products of an optimizer do not grow
with it.
"""

from collections.abc import Iterator

from inrank_megatron.benchmarks.blocks import DENSE, phase_2, preset_config, single_process
from inrank_megatron.benchmarks.flops import count_flops
from inrank_megatron.benchmarks.rows import Row
from inrank_megatron.benchmarks.step import GPT2_VOCABULARY, VOCABULARIES, training_step
from inrank_megatron.benchmarks.timing import interleaved
from inrank_megatron.config.orthogonalisation_costs import orthogonalisation_flops
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.engine.engine import Engine

MUON = {"matrix_optimizer": "muon"}
OPTIMIZERS = {
    "AdamW": {},
    "Muon": MUON,
    "Spectron": {"factor_optimizer": "spectron"},
    "LoRA-Muon": {"factor_optimizer": "lora-muon"},
    "Spectron, Muon": {"factor_optimizer": "spectron", **MUON},
}


def measure(preset: str, rank: int, *, repeats: int) -> Iterator[Row]:
    """Rows for the dense model and for factors of that rank."""
    vocabulary = VOCABULARIES.get(preset, GPT2_VOCABULARY)
    for variant, names in (
        (DENSE, ("AdamW", "Muon")),
        (phase_2(rank), ("AdamW", "Spectron", "LoRA-Muon", "Spectron, Muon")),
    ):
        configs = {name: preset_config(preset, **OPTIMIZERS[name]) for name in names}
        with single_process() as parallel:
            trained = {n: training_step(c, variant, parallel, vocabulary) for n, c in configs.items()}
            runs = {name: step for name, (_, step) in trained.items()}
            flops = {name: count_flops(run) for name, run in runs.items()}
            moments = {name: _moments(engine) for name, (engine, _) in trained.items()}
            times = interleaved(runs, repeats=repeats)
        for name, config in configs.items():
            model, size = config.model, config.training.micro_batch_size
            case = f"{preset} {variant.name}, {size} x {model.seq_length} tokens, {name}"
            shapes = linear_shapes(config)
            columns = None if variant.columns is None else dict.fromkeys(shapes, variant.columns)
            expected = orthogonalisation_flops(config, columns) / flops["AdamW"]
            yield Row(case, "operations beyond AdamW", flops[name] / flops["AdamW"] - 1, expected)
            yield Row(case, "bytes of moments", moments[name], moments["AdamW"])
            yield Row(
                case, "seconds a step", times.median(name), ratio_vs_reference=times.ratio(name, "AdamW")
            )


def _moments(engine: Engine) -> int:
    master_weights = engine.master_weights
    return sum(4 * p.numel() * len(master_weights.moments(p)) for _, p in engine.parameters())
