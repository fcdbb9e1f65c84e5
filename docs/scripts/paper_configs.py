"""Writes ``configs/paper/``: the runs of the InRank paper (arXiv 2306.11250, tables 1 to 5), from one table.

``python docs/scripts/paper_configs.py`` writes all files; a test fails while one is out of date. The
thresholds 0.8 and 0.85 of table 3 and other precisions are flags, not files: ``--threshold 0.85``,
``--fp16``, ``--bf16``.
"""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "configs" / "paper"
STEPS, EPOCH, BATCH = 22500, 225, 512
"""100 epochs of 225 steps of 512 sequences."""
PRECISIONS = {"fp16": "fp16: true\n", "fp32": ""}


@dataclass(frozen=True)
class Model:
    """Of table 4. ``ranks``: that InRank-Efficient found at each threshold (table 3). ``micro``: sequences in
    one forward pass, which changes nothing but memory and time.
    """

    size: str
    lr: str
    precision: str
    cluster: str
    micro: int
    ranks: dict[float, int]


MODELS = (
    Model("small", "6.0e-4", "fp16", "8xV100-32GB", 8, {0.8: 152, 0.85: 192, 0.9: 254}),
    Model("medium", "1.5e-4", "fp32", "8xA100-80GB", 8, {0.8: 168, 0.85: 213, 0.9: 286}),
    Model("large", "1.5e-4", "fp32", "8xA100-80GB", 4, {0.8: 179, 0.85: 230, 0.9: 312}),
)
METHODS = {
    "dense": ("the dense baseline", "method: dense\n"),
    "fixed_rank": (
        "fixed rank (table 2): the rank that InRank-Efficient found at threshold 0.9",
        "method: fixed-rank\nrank: {rank}\n",
    ),
    "inrank": (
        "InRank-Efficient by the authors' code; --inrank-preset paper gives the algorithm as printed",
        "method: inrank-efficient\ninrank_preset: released\nswitch_epochs: 1\n",
    ),
}


def files() -> dict[str, str]:
    """File name -> content."""
    return {f"gpt2_{model.size}_{name}.yaml": _file(model, name) for model in MODELS for name in METHODS}


def _file(model: Model, name: str) -> str:
    title, method = METHODS[name]
    return f"""\
# Written by docs/scripts/paper_configs.py. GPT-2 {model.size} on WikiText-103, {title}.
# Precision and GPUs as in table 4 of the InRank paper: --dry-run --cluster {model.cluster}.
{method.format(rank=model.ranks[0.9])}
model_preset: {model.size}
hidden_dropout: 0.1
attention_dropout: 0.1

dataset: Salesforce/wikitext:wikitext-103-raw-v1
tokenizer: gpt2

micro_batch_size: {model.micro}
global_batch_size: {BATCH}
train_iters: {STEPS}
{PRECISIONS[model.precision]}seed: 1113

lr: {model.lr}
lr_decay_style: linear
lr_warmup_iters: {EPOCH}
weight_decay: 0.1
adam_beta1: 0.9
adam_beta2: 0.999
clip_grad: 1.0

eval_interval: {EPOCH}
save_interval: {10 * EPOCH}
"""


def main() -> None:
    """Write all files."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
