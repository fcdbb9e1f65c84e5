"""Writes ``docs/evidence/data/scaling.csv``: predicted step times of GPT-2 large on 8 to 1,024 GPUs.

``python docs/scripts/scaling.py``; a test fails while the rows are out of date. ``plots.py`` draws them.
"""

import csv
import io
from pathlib import Path

from inrank_megatron.config.cli import parse
from inrank_megatron.config.cluster import parse_cluster
from inrank_megatron.planning.forecast import Forecast, forecast, ranking
from inrank_megatron.planning.space import Candidate, candidates
from inrank_megatron.planning.timeline import Assumed

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs" / "evidence" / "data" / "scaling.csv"
GPUS = tuple(8 * 2**n for n in range(8))
STRONG_BATCH, WEAK_BATCH = 512, 64
"""Sequences of a step: in all, and for each GPU."""
METHODS = {"dense": "gpt2_large_dense", "InRank-Efficient": "gpt2_large_inrank"}
VOCABULARY, RANK = 50257, 312


def text() -> str:
    """The file."""
    out = io.StringIO()
    rows = [
        _row(scaling, method, gpus) for scaling in ("strong", "weak") for method in METHODS for gpus in GPUS
    ]
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _row(scaling: str, method: str, gpus: int) -> dict[str, object]:
    batch = STRONG_BATCH if scaling == "strong" else WEAK_BATCH * gpus
    best = _fastest(METHODS[method], gpus, batch)
    topology, times = best.candidate.topology, [(one.phase.steps, one.time) for one in best.phases]
    steps = sum(number for number, _ in times)

    def mean(part: str) -> str:
        return f"{sum(number * getattr(time, part) for number, time in times) / steps:.5f}"

    return {
        "scaling": scaling,
        "method": method,
        "gpus": gpus,
        "sequences": batch,
        "tensor_model_parallel_size": topology.tensor_model_parallel_size,
        "micro_batch_size": topology.micro_batch_size,
        "step_seconds": mean("total"),
        **{
            part: mean(part)
            for part in ("compute", "tensor_communication", "data_communication", "optimizer")
        },
    }


def _fastest(name: str, gpus: int, batch: int) -> Forecast:
    """Of all topologies with ZeRO 1, without offload and recomputation. The plan takes the parameters that
    ZeRO 3 gathers as hidden behind products, so it would choose ZeRO 3 for a reason that no run has shown.
    """
    flags = ["--config", str(ROOT / "configs" / "paper" / f"{name}.yaml"), "--bf16", "--zero-stage", "1"]
    flags += ["--global-batch-size", str(batch), "--dry-run", "--cluster", f"{gpus // 8}x8xA100-80GB"]
    config, cluster = parse(flags, world_size=1).config, parse_cluster(flags[-1])
    kept = ("zero_stage", "offload_optimizer", "recompute_granularity")
    found = candidates(config, cluster, vocab_size=VOCABULARY, pinned=kept)
    # An epoch as long as the paper's: one that a larger batch shortens would lengthen the second phase.
    assumed = Assumed(VOCABULARY, RANK, epoch_steps=225)
    return min((forecast(one, cluster, assumed) for one in found if isinstance(one, Candidate)), key=ranking)


def main() -> None:
    """Write the file."""
    DATA.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
