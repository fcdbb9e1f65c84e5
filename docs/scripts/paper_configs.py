"""Writes ``configs/paper/``: the runs of the InRank paper (arXiv 2306.11250, tables 1 to 5) and those of the
ReLoRA paper on C4 (arXiv 2307.05695), each from one table.

``python docs/scripts/paper_configs.py`` writes all files; a test fails while one is out of date. The
thresholds 0.8 and 0.85 of InRank's table 3 and other precisions are flags, not files: ``--threshold 0.85``,
``--fp16``, ``--bf16``.
"""

import math
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


@dataclass(frozen=True)
class Llama:
    """Of ReLoRA's paper. ``batch``: sequences, by the authors' scripts for 60M, 130M and 250M.

    ``lr``, ``relora_lr``: of the full-rank run and of ReLoRA. ``interval``: steps between two merges, by the
    authors' scripts for 60M, 130M and 250M. ``warmup``, ``restart_warmup``: of ReLoRA, at its start and after
    each merge, by those scripts, for 1.3B by the paper. ``paper_runs.md`` says what of it is assumed.
    """

    size: str
    length: int
    batch: int
    tokens: float
    lr: str
    relora_lr: str
    interval: int
    micro: int
    warmup: int = 500
    restart_warmup: int = 100

    @property
    def steps(self) -> int:
        """That read the paper's tokens."""
        return math.ceil(self.tokens / (self.batch * self.length))


WARM_START = 5000
"""Steps at full rank before ReLoRA, which count among the steps."""
LLAMAS = (
    Llama("60m", 256, 480, 1.2e9, "1.0e-3", "2.0e-3", 1000, 30),
    Llama("130m", 256, 600, 2.6e9, "1.0e-3", "2.0e-3", 2000, 25),
    Llama("250m", 512, 1152, 6.8e9, "5.0e-4", "1.0e-3", 5000, 16),
    Llama("350m", 512, 1152, 6.8e9, "5.0e-4", "1.0e-3", 5000, 16),
    Llama("1.3b", 512, 1536, 23.1e9, "4.0e-4", "5.0e-4", 5000, 8, 100, 50),
)
TRAININGS = {
    "dense": ("at full rank", "method: dense\n"),
    "relora": (
        f"by ReLoRA after {WARM_START:,} steps at full rank",
        """\
method: relora
factorised_linears: mlp-attention
qkv_factors: separate
rank: 128
relora_interval: {interval}
relora_reset: magnitude
relora_reset_share: 0.9
relora_warmup_iters: {restart_warmup}
""",
    ),
}


def files() -> dict[str, str]:
    """File name -> content."""
    inrank = {f"gpt2_{model.size}_{name}.yaml": _file(model, name) for model in MODELS for name in METHODS}
    return inrank | {
        f"llama_{model.size}_{name}.yaml": _llama(model, name) for model in LLAMAS for name in TRAININGS
    }


def _llama(model: Llama, name: str) -> str:
    title, method = TRAININGS[name]
    full = name == "dense"
    start = (
        f"# Its checkpoint of step {WARM_START:,} is where the ReLoRA run starts."
        if full
        else f"# Give --pretrained-checkpoint: llama_{model.size}_dense.yaml's of step {WARM_START:,}."
    )
    return f"""\
# Written by docs/scripts/paper_configs.py. LLaMA {model.size.upper()} on C4, {title}, in BF16.
# Which settings are ReLoRA's paper's, its authors' scripts' or assumed: docs/guides/paper_runs.md.
{start}
# Planned for one node of eight GPUs: --dry-run --cluster 8xA100-80GB.
{method.format(interval=model.interval, restart_warmup=model.restart_warmup)}
model_preset: llama-{model.size}
seq_length: {model.length}

dataset: allenai/c4:en
tokenizer: t5-base

micro_batch_size: {model.micro}
global_batch_size: {model.batch}
train_iters: {model.steps if full else model.steps - WARM_START}
bf16: true
seed: 1234

lr: {model.lr if full else model.relora_lr}
min_lr: {_tenth(model.lr if full else model.relora_lr)}
lr_decay_style: cosine
lr_warmup_iters: {500 if full else model.warmup}
weight_decay: 0.0
adam_beta1: 0.9
adam_beta2: 0.999
clip_grad: 1.0

eval_interval: 1000
save_interval: {WARM_START if full else 1000}
"""


def _tenth(rate: str) -> str:
    digits, _, power = rate.partition("e-")
    return f"{digits}e-{int(power) + 1}"


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
