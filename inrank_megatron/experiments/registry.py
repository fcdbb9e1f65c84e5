"""The experiments of ``tools/reproduce.py``. A new one of a paper is a module and an entry here."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from inrank_megatron.experiments import on_engine, on_launches, on_paper, on_run, on_tables

How = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]
"""What adds the flags, and what runs."""

ENGINE: How = on_engine.add_flags, on_engine.run
LAUNCHES: How = on_launches.add_flags, on_launches.run
PAPER: How = on_paper.add_flags, on_paper.run
RUN: How = on_run.add_flags, on_run.run
TABLES: How = on_tables.add_flags, on_tables.run


@dataclass(frozen=True)
class Experiment:
    """What one answers, where it comes from, what it takes, and how it is called."""

    note: str
    source: str
    cost: str
    how: How


EXPERIMENTS = {
    "figure1": Experiment(
        "how much of each layer's update does its rank explain, in the first and in the last block of a run?",
        "InRank, figure 1",
        "seconds, from the files of a run",
        RUN,
    ),
    "figures5to7": Experiment(
        "how does the rank of each layer of a run grow?",
        "InRank, figures 5 to 7",
        "seconds, from the files of a run",
        RUN,
    ),
    "table1": Experiment(
        "what did the runs of the InRank paper's tables come to, and what does a plan predict?",
        "InRank, tables 1 to 5",
        "seconds, from the files of runs; a run takes hours or days of 8 GPUs",
        TABLES,
    ),
    "glrl": Experiment(
        "does greedy low-rank learning find a planted rank?",
        "InRank, algorithm 1",
        "40 s of a core; quick 4 s",
        PAPER,
    ),
    "initialisation": Experiment(
        "which solution does gradient descent find from a small and from an ordinary start?",
        "InRank, theorem 1",
        "20 s of a core; quick 5 s",
        PAPER,
    ),
    "glrl_inrank": Experiment(
        "do GLRL and InRank find the same solution of a planted problem?",
        "InRank, algorithms 1 and 2",
        "90 s of a core; quick 10 s",
        PAPER,
    ),
    "theorem2": Experiment(
        "does a linear network follow equation 4?",
        "InRank, theorem 2, figure 2",
        "7 s of a core; quick 4 s",
        PAPER,
    ),
    "assumptions": Experiment(
        "what becomes of equation 4 where an assumption does not hold?",
        "InRank, theorem 2",
        "7 s of a core; quick 4 s",
        PAPER,
    ),
    "figure3": Experiment(
        "are the updates of a perceptron of low rank, whatever its initialisation?",
        "InRank, figure 3",
        "2 min; quick 20 s",
        PAPER,
    ),
    "figure3_fashion_mnist": Experiment(
        "as figure3, on Fashion-MNIST from the hub or its cache",
        "InRank, figure 3",
        "not measured",
        PAPER,
    ),
    "figure4": Experiment(
        "does a criterion find the rank beyond which a sweep of fixed ranks gains little?",
        "InRank, figure 4",
        "4 min of a core; quick about 2 min",
        PAPER,
    ),
    "figures8_14": Experiment(
        "are the updates of recurrent networks and of a Transformer of low rank, and if they are deeper?",
        "InRank, figures 8 to 14",
        "2 min of a core; quick 10 s",
        PAPER,
    ),
    "figure15": Experiment(
        "are the updates of a perceptron of low rank, whatever its optimizer?",
        "InRank, figure 15",
        "15 s of a core; quick 5 s",
        PAPER,
    ),
    "tables2_3_5": Experiment(
        "is a fixed rank as good as InRank's, what does the threshold do, and does FP16 train as FP32?",
        "InRank, tables 2, 3 and 5",
        "5 min of a core; quick about 1 min",
        PAPER,
    ),
    "relora": Experiment(
        "is ReLoRA's update of higher rank than LoRA's, and what is each of its parts worth?",
        "ReLoRA, its spectra, ablation and negative result",
        "5 min of a core; quick about 2 min",
        PAPER,
    ),
    "relora_8_bit": Experiment(
        "what does W0 take in 8 bits between merges, and what does it cost in loss?",
        "ReLoRA, quantised W0",
        "3 min of a core; --seeds 1 takes 1",
        ENGINE,
    ),
    "teacher": Experiment(
        "does InRank find the rank of a linear teacher?", "docs/evidence/learned_ranks.md", "hours", ENGINE
    ),
    "controls": Experiment(
        "do learned ranks come from the data, or from settings?",
        "docs/evidence/learned_ranks.md",
        "hours",
        ENGINE,
    ),
    "compare": Experiment(
        "which method learns most, at equal steps and at equal operations?",
        "docs/evidence/comparison.md",
        "days, or as long as its runs take",
        LAUNCHES,
    ),
}
