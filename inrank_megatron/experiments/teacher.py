"""Does InRank find the rank of a linear teacher? A wider linear student learns it on the real engine.

The teacher is ``T = A S B^T`` of rank r* with r* equal singular values; the student ``W0 + U V`` of the same
shape sees ``y = T x`` for ``x ~ N(0, 1)``. What the student should find is what the criterion gives on T
itself: with equal values and alpha 0.9 somewhat less than r*.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import qkv_layout
from inrank_megatron.distributed.platform import device
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.experiments.driver import chosen, re_estimated, smallest_rank, train
from inrank_megatron.lowrank.layers.factorised import ColumnParallelFactorised
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.inrank import InRank
from inrank_megatron.model.initialise import draw_weight

LINEAR = "linear"


@dataclass(frozen=True)
class Teacher:
    """``T`` [width, width] of ``rank`` equal singular values ``value``, and a stream of examples."""

    width: int
    rank: int
    value: float
    seed: int

    @property
    def matrix(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        left, right = (
            torch.linalg.qr(torch.randn(self.width, self.rank, generator=generator)).Q for _ in range(2)
        )
        return self.value * left @ right.T

    def batch(self, matrix: Tensor, step: int, *, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [size, width] of a step (from 0); ``matrix`` is the teacher's."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step + 1)
        x = torch.randn(size, self.width, generator=generator)
        return x, x @ matrix.T

    def own_rank(self, threshold: float) -> int:
        """What the criterion gives on the teacher's own matrix."""
        values = [self.value] * self.rank
        return smallest_rank(values, threshold=threshold, length=self.width)


class LinearStudent(nn.Module):
    """One factorised linear and its squared error, called as the engine calls a language model."""

    def __init__(self, width: int, factors: FactorSpec, parallel: Parallel):
        super().__init__()
        self.embedding = nn.Identity()  # where the engine asks for the input's gradient
        layer = SimpleNamespace(sequence_parallel=False, params_dtype=torch.float32)
        self.linear = ColumnParallelFactorised(
            width, width, config=layer, bias=False, factors=factors, tp_group=parallel.tp_group
        )

    def forward(self, x: Tensor, positions: Tensor, mask: None, *, labels: Tensor) -> Tensor:
        """Squared error [B, O] for inputs ``x`` [B, I] and targets ``labels`` [B, O]."""
        return (self.linear(self.embedding(x)[None])[0][0] - labels).square()


@dataclass(frozen=True)
class StudentFactory:
    """Builds the student; W0 is N(0, ``init_method_std``)."""

    config: Config
    parallel: Parallel

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        width = self.config.model.hidden_size
        return {LINEAR: (width, width)}

    def build(self, factors: Mapping[str, FactorSpec]) -> nn.Module:
        student = LinearStudent(self.config.model.hidden_size, factors[LINEAR], self.parallel)
        student.linear.weight.data.copy_(self.initial_weight(LINEAR))
        return student

    def initial_weight(self, name: str) -> Tensor:
        model, width = self.config.model, self.config.model.hidden_size
        seed, std = self.config.training.seed, model.init_method_std
        layout = qkv_layout(self.config)
        return draw_weight(name, (width, width), seed=seed, std=std, num_layers=1, layout=layout)


def student_config(teacher: Teacher, **settings) -> Config:
    """A run's settings for a student of ``teacher``; ``settings`` by flat name."""
    return from_flat(
        {
            "num_layers": 1,
            "hidden_size": teacher.width,
            "ffn_hidden_size": teacher.width,
            "num_attention_heads": 1,
            "seq_length": 1,
            "micro_batch_size": 64,
            "method": InRank.name,
            "seed": teacher.seed,
            "weight_decay": 0.0,
            "clip_grad": 0.0,
            "lr_decay_style": "constant",
            **settings,
        }
    )


@dataclass(frozen=True)
class Learned:
    """A trained student.

    Attributes:
        rank: that the run reached.
        re_estimated: the criterion's rank of the last check's spectrum, where ranks may fall (``refound`` in
            rows).
        target: the criterion's rank of the update ``T - W0`` that a perfect student would make.
        loss: the last, mean squared error.
    """

    rank: int
    re_estimated: int
    target: int
    loss: float


def learn(teacher: Teacher, config: Config, parallel: Parallel) -> Learned:
    """Train a student by the method of ``config``."""
    factory, threshold, matrix = StudentFactory(config, parallel), config.inrank.threshold, teacher.matrix

    def batches(step: int) -> list[tuple[Tensor, Tensor]]:
        x, y = teacher.batch(matrix, step, size=config.training.micro_batch_size)
        return [(x.to(device()), y.to(device()))]

    outcome = train(factory, {LINEAR: teacher.width}, batches, config=config, parallel=parallel)
    target = torch.linalg.svdvals(matrix - factory.initial_weight(LINEAR)).tolist()
    return Learned(
        rank=outcome.ranks[LINEAR],
        re_estimated=re_estimated(outcome.last, threshold=threshold)[0],
        target=smallest_rank(target, threshold=threshold, length=teacher.width),
        loss=outcome.losses[-1],
    )


WIDTH, RANKS, STEPS = 256, (4, 16, 64), 2000
VARIANTS: dict[str, dict] = {
    "defaults": {},
    "first check at 500": {"rank_check_interval": 500},
    "buffer 8": {"buffer": 8},
    # The largest rank is left out of the question: by default it would be 128 - 100 columns.
    "buffer 100": {"buffer": 100, "max_rank": 156},
    "buffer 100, first check at 500": {"buffer": 100, "max_rank": 156, "rank_check_interval": 500},
    "random start, first check at 500": {"factor_init": "random", "rank_check_interval": 500},
    "values 4, first check at 500": {"value": 4.0, "rank_check_interval": 500},
    "values 2, first check at 500": {"value": 2.0, "rank_check_interval": 500},
    "values 2, W0 of 0.002, first check at 500": {
        "value": 2.0,
        "init_method_std": 0.002,
        "rank_check_interval": 500,
    },
}


def measure(
    parallel: Parallel,
    seeds: Sequence[int],
    *,
    only: Sequence[str] | None,
    steps: int | None,
    multiplier: float,
    notify: Callable[[str], None],
) -> list[dict]:
    """A row for each variant and teacher; lists have one entry a seed."""
    rows = []
    for name, settings in chosen(VARIANTS, only).items():
        for rank in RANKS:
            settings = {"value": 8.0} | settings
            teachers = [Teacher(WIDTH, rank, settings["value"], seed) for seed in seeds]
            changes = {key: value for key, value in settings.items() if key != "value"}
            changes["factor_lr_multiplier"] = multiplier
            configs = [student_config(t, train_iters=steps or STEPS, lr=2e-3, **changes) for t in teachers]
            found = [learn(t, config, parallel) for t, config in zip(teachers, configs, strict=True)]
            own = teachers[0].own_rank(configs[0].inrank.threshold)
            rows.append(
                {
                    "variant": name,
                    "teacher": rank,
                    "criterion_on_teacher": own,
                    "criterion_on_target": [one.target for one in found],
                    "rank": [one.rank for one in found],
                    "refound": [one.re_estimated for one in found],
                    "within_10_percent": all(abs(one.rank - own) <= 0.1 * own for one in found),
                    "loss": [one.loss for one in found],
                }
            )
            notify(f"{name}, rank {rank}: {rows[-1]['rank']}, criterion on the teacher {own}")
    return rows
