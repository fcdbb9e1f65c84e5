"""Short trainings of a tiny GPT by one method on one layout of ranks, and what they leave behind.

Top-level functions that ranks run; the assertions are in the test modules beside this one.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.distributed.platform import device
from inrank_megatron.engine.decisions import decide
from inrank_megatron.engine.deepspeed_setup import stop_deepspeed
from inrank_megatron.engine.engine import Engine
from inrank_megatron.engine.fragments import read_value
from inrank_megatron.engine.state import engine_record, load_engine, recorded_structure, whole_tensors
from inrank_megatron.engine.zero_state import ParameterState, read_state, write_state
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.base import Method
from inrank_megatron.lowrank.methods.changes import Refactor
from inrank_megatron.lowrank.methods.registry import METHODS as REGISTRY
from inrank_megatron.lowrank.methods.registry import make_method
from inrank_megatron.model.gpt import GPTFactory
from inrank_megatron.training.pretrained import read_pretrained
from inrank_megatron.training.schedule import learning_rate
from tests.groups import join
from tests.harness import at_end

VOCABULARY, PADDED = 500, 512
GLOBAL_BATCH, ACCUMULATION = 4, 2
CHECK = 5
STAND_INS = Path(__file__).resolve().parent.parent / "stand_ins"
"""Holds an `apex` that keeps its state as NVIDIA's does."""

SIZES = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "train_iters": 50,
    "global_batch_size": GLOBAL_BATCH,
    "lr": 1e-3,
    "clip_grad": 0.5,
}
# A start on the scale of these small weights, whose largest singular values are a third of those at width
# 768: the default's magnifies rounding, see `compare.py`.
GROWING = {
    "rank_check_interval": CHECK,
    "buffer": 8,
    "initial_column_norm": 0.1,
}
METHODS = {
    "dense": {"method": "dense"},
    "fixed-rank": {"method": "fixed-rank", "rank": 15},
    "fixed-rank-random": {"method": "fixed-rank", "rank": 15, "factor_init": "random"},
    "fixed-rank-attention": {
        "method": "fixed-rank",
        "rank": 15,
        "factorised_linears": "mlp-attention",
        "qkv_factors": "separate",
    },
    "lora": {"method": "lora", "rank": 8},
    "lora-attention": {"method": "lora", "rank": 8, "factorised_linears": "mlp-attention"},
    "relora": {"method": "relora", "rank": 8, "relora_interval": 2 * CHECK, "relora_warmup_iters": 2},
    "inrank": {"method": "inrank", **GROWING},
    "inrank-random": {
        "method": "inrank",
        "factor_init": "random",
        "rank_criterion": "eq7",
        "eq7_window": "fixed",
        "threshold": 0.6,
        **GROWING,
    },
    "inrank-kaiming": {"method": "inrank", "factor_init": "kaiming", **GROWING},
    "inrank-efficient": {"method": "inrank-efficient", **GROWING},
    "inrank-efficient-default-start": {
        "method": "inrank-efficient",
        "rank_check_interval": CHECK,
        "buffer": 8,
    },
    "inrank-efficient-attention": {
        "method": "inrank-efficient",
        "factorised_linears": "mlp-attention",
        "recompute_granularity": "full",
        **GROWING,
    },
    "llama-dense": {"method": "dense", "model_type": "llama"},
    "llama-lora": {"method": "lora", "model_type": "llama", "rank": 8},
    "llama-inrank": {
        "method": "inrank",
        "model_type": "llama",
        "factorised_linears": "mlp-attention",
        **GROWING,
    },
    "llama-warm-start": {
        "method": "warm-start",
        "model_type": "llama",
        "factorised_linears": "mlp-attention",
        "truncation": "fisher",
    },
    "llama-fixed-rank": {"method": "fixed-rank", "model_type": "llama", "rank": 15},
    "llama-relora": {
        "method": "relora",
        "model_type": "llama",
        "factorised_linears": "mlp-attention",
        "rank": 8,
        "relora_interval": 2 * CHECK,
        "relora_reset": "random",
        "relora_warmup_iters": 2,
    },
    "llama-inrank-efficient": {
        "method": "inrank-efficient",
        "model_type": "llama",
        "factorised_linears": "mlp-attention",
        "qkv_factors": "separate",
        "recompute_granularity": "full",
        "absorb_columns": True,
        **GROWING,
    },
    "inrank-efficient-eq7": {
        "method": "inrank-efficient",
        "rank_criterion": "eq7",
        "threshold": 0.6,
        "absorb_columns": True,
        **GROWING,
    },
    "inrank-efficient-released": {
        "method": "inrank-efficient",
        "rank_criterion": "released",
        "frozen_base": False,
        "factor_init": "kaiming",
        **GROWING,
    },
    # Its buffer and its 200 steps before the first check are those of larger models and longer runs.
    "inrank-efficient-preset-released": {
        "method": "inrank-efficient",
        "inrank_preset": "released",
        "rank_check_start": 0,
        **GROWING,
    },
    "inrank-efficient-patience": {
        "method": "inrank-efficient",
        "switch_patience": 2,
        "truncation": "plain",
        "rank_multiple_of": 4,
        "new_column_moments": "mean",
        **GROWING,
    },
    # Starts with more than it needs, so that ranks fall at the switch.
    "inrank-efficient-refound": {
        "method": "inrank-efficient",
        "final_ranks": "refound",
        "initial_rank": 10,
        **GROWING,
    },
    "inrank-efficient-fisher": {
        "method": "inrank-efficient",
        "truncation": "fisher",
        "final_ranks": "output",
        "parameter_budget": 0.3,
        **GROWING,
    },
    "inrank-efficient-paper": {
        "method": "inrank-efficient",
        "inrank_preset": "paper",
        **GROWING,
    },
    "warm-start": {"method": "warm-start"},
    "warm-start-budget": {
        "method": "warm-start",
        "factorised_linears": "mlp-attention",
        "parameter_budget": 0.4,
    },
}


@dataclass(frozen=True)
class Layout:
    """How the ranks share the work; data-parallel over what tensor parallelism leaves."""

    world_size: int = 1
    tensor_parallel: int = 1
    sequence_parallel: bool = True
    apart: bool = False  # factors beside W0 stay in rank space, which these small layers would not choose

    @property
    def data_parallel(self) -> int:
        return self.world_size // self.tensor_parallel


LAYOUTS = {
    "TP1 DP1": Layout(),
    "TP2 SP": Layout(2, 2),
    "TP2 without SP": Layout(2, 2, sequence_parallel=False),
    "DP2": Layout(2, 1),
    "TP2 SP DP2": Layout(4, 2),
    "TP2 SP apart": Layout(2, 2, apart=True),
    "TP4 SP": Layout(4, 4),
}


def counting_rows(seed: int, size: int = GLOBAL_BATCH) -> Tensor:
    """A global batch [size, 33] of sequences that count in threes, so that there is something to learn."""
    first = torch.randint(0, VOCABULARY, (size, 1), generator=torch.Generator().manual_seed(seed))
    return (first + 3 * torch.arange(33)) % VOCABULARY


@dataclass
class Session:
    """A training in progress on this rank."""

    engine: Engine
    method: Method
    step: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    ranks: list[dict[str, int]] = field(default_factory=list)

    def batch(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's micro-batches of a step (from 0)."""
        training, parallel = self.engine.config.training, self.engine.parallel
        rows = counting_rows(step, training.global_batch_size).to(self.engine.device)
        for index in range(self.engine.accumulation):
            size = training.micro_batch_size
            first = (index * parallel.dp_size + parallel.dp_rank) * size
            own = rows[first : first + size]
            yield own[:, :-1], own[:, 1:]

    @torch.no_grad()
    def fixed_loss(self) -> float:
        """Loss on a batch that no step trains on, the same on every rank."""
        rows = counting_rows(999).to(self.engine.device)
        return Engine.loss(self.engine.model, (rows[:, :-1], rows[:, 1:])).item()

    @property
    def is_final(self) -> bool:
        """Whether every factorisable linear has the rank that it will keep."""
        return all(view.final for view in self.engine.views())

    def start(self) -> "Session":
        self.engine.apply(self.method.start(), step=0, batches=self.batch)
        return self

    def train(self, steps: int) -> "Session":
        for _ in range(steps):
            self.train_step()
            self.apply(self.decide())
        return self

    def train_step(self) -> None:
        """A step without the method's changes."""
        self.step += 1
        config, lr = self.engine.config, self.engine.config.optimizer.lr
        if (
            config.training.method == "relora"
        ):  # whose schedule is part of the method; others stay at the peak
            lr = learning_rate(self.step, config)
        result = self.engine.train_step(self.batch(self.step - 1), step=self.step, lr=lr)
        self.losses.append(result.loss)
        self.grad_norms.append(result.grad_norm)

    def decide(self) -> list:
        """The method's changes after the present step."""
        decision = decide(self.engine, self.method, step=self.step, batches=self.batch)
        return [] if decision is None else list(decision.changes)

    def spectra(self) -> dict[str, dict[str, tuple[float, ...]]]:
        """Singular values by kind and layer."""
        views = {kind: self.engine.views(spectrum=kind, step=self.step) for kind in ("update", "product")}
        return {kind: {view.name: view.singular_values for view in views[kind]} for kind in views}

    def apply(self, changes: list) -> None:
        self.engine.apply(changes, step=self.step, batches=self.batch)
        self.ranks.append(dict(self.engine.ranks))


def configuration(name: str, layout: Layout, **changes) -> Config:
    return from_flat(
        {
            **SIZES,
            **METHODS[name],
            "tensor_model_parallel_size": layout.tensor_parallel,
            "sequence_parallel": layout.sequence_parallel,
            "micro_batch_size": GLOBAL_BATCH // (ACCUMULATION * layout.data_parallel),
            **changes,
        }
    )


def build(
    name: str,
    layout: Layout,
    *,
    switch: int = 4 * CHECK,
    record: dict | None = None,
    pretrained: Path | None = None,
    deepspeed_json: dict | None = None,
    **changes,
) -> Session:
    """A session whose factors are still empty; with ``record`` one of the recorded structure, with
    ``pretrained`` one that starts from the weights of that checkpoint.
    """
    stop()
    if pretrained:
        changes["pretrained_checkpoint"] = str(pretrained)
    config = configuration(name, layout, **changes)
    if config.optimizer.optimizer == "apex-fused-adam" and str(STAND_INS) not in sys.path:
        sys.path.insert(0, str(STAND_INS))
    parallel = join(layout.tensor_parallel)
    by_step = REGISTRY[config.training.method].switches and config.inrank.switch_patience is None
    method = make_method(config, switch_step=switch if by_step else None)
    if record is None:
        structure = method.structure({key: min(shape) for key, shape in linear_shapes(config).items()})
    else:
        structure = recorded_structure(record)
    factory = GPTFactory(
        config,
        parallel,
        vocab_size=VOCABULARY,
        padded_vocab_size=PADDED,
        pretrained=read_pretrained(pretrained, config) if pretrained else None,
    )
    engine = Engine(
        factory,
        structure,
        config=config,
        parallel=parallel,
        device=device(),
        accumulation=ACCUMULATION,
        deepspeed_json=deepspeed_json,
    )
    for layer in engine.layers.values():
        layer.joint = layer.joint and not layout.apart
    _open.append(engine)
    at_end.append(stop)
    return Session(engine, method)


def stop() -> None:
    """End this rank's session, if there is one."""
    while _open:
        stop_deepspeed(_open.pop().deepspeed)


_open: list[Engine] = []
"""The engine of this rank's session before: its hooks outlive it unless it is stopped."""


def run(
    rank: int,
    world_size: int,
    name: str,
    layout: Layout,
    settings: dict,
    steps: int,
    given: list[list] | None = None,
) -> dict:
    """A whole training: loss, gradient norm, ranks and the method's changes of every step; with ``given``
    these changes are carried out instead.
    """
    session, changes = build(name, layout, **settings).start(), []
    for index in range(steps):
        session.train_step()
        changes.append(session.decide())
        session.apply(given[index] if given else changes[-1])
    return {
        "losses": session.losses,
        "grad_norms": session.grad_norms,
        "ranks": session.ranks,
        "changes": changes,
    }


# ---- one change, seen from both sides ------------------------------------------------------------------


def states(session: Session) -> dict[str, dict[str, Tensor]]:
    """This rank's shard of every trained parameter: master and moments."""
    return {
        name: {"master": state.master, **state.moments}
        for name, parameter in session.engine.parameters()
        for state in [read_state(parameter)]
    }


def first_step_of_new_columns(rank: int, world_size: int, layout: Layout, settings: dict) -> float:
    """The largest update of an entry of a column in its first step, over the learning rate; late in a run, as
    Adam sees it: its bias corrections are moved from the step counts into the moments.
    """
    session = build("inrank", layout, **settings).start().train(CHECK - 1)
    session.train_step()
    adam = session.engine.config.optimizer
    for _, parameter in session.engine.parameters():
        state = read_state(parameter)
        first, second = (
            moment / (1 - beta**CHECK)
            for moment, beta in zip(state.moments.values(), (adam.adam_beta1, adam.adam_beta2), strict=True)
        )
        write_state(parameter, ParameterState(state.master, {"exp_avg": first, "exp_avg_sq": second}))
    session.engine.masters.set_steps(dict.fromkeys(session.engine.masters.steps(), 100_000))
    changes = session.decide()
    active = {name: layer.active for name, layer in session.engine.layers.items()}
    session.apply(changes)
    before = states(session)
    session.train_step()
    updates = [
        (state["master"] - before[name]["master"]).narrow(dim, old, session.engine.layers[layer].active - old)
        for name, state in states(session).items()
        for layer, _, leaf in [name.rpartition(".")]
        if leaf in ("U", "V")
        for dim, old in [(1 if leaf == "U" else 0, active[layer])]
    ]
    return max(update.abs().max().item() for update in updates if update.numel()) / SIZES["lr"]


def first_updates(rank: int, world_size: int, layout: Layout, settings: dict) -> list[dict[str, float]]:
    """The largest update of an entry of each parameter over the learning rate, in the first step and in the
    first after the switch.
    """
    session = build("inrank-efficient", layout, switch=2, **settings).start()
    seen = []
    for _ in range(2):
        before = states(session)
        session.train_step()
        seen.append(
            {
                name: (state["master"] - before[name]["master"]).abs().max().item() / SIZES["lr"]
                for name, state in states(session).items()
                if state["master"].numel()
            }
        )
        session.train(1)
    return seen


def around_growth(rank: int, world_size: int, layout: Layout, settings: dict) -> dict:
    """State before and after the first rank check."""
    session = build("inrank", layout, **settings).start().train(CHECK - 1)
    session.train_step()
    changes = session.decide()
    active = {name: layer.active for name, layer in session.engine.layers.items()}
    before, loss = states(session), session.fixed_loss()
    session.apply(changes)
    return {
        "before": before,
        "after": states(session),
        "loss": (loss, session.fixed_loss()),
        "active": active,
        "grown": {name: layer.active for name, layer in session.engine.layers.items()},
    }


def beyond_use(rank: int, world_size: int, name: str, layout: Layout, settings: dict, steps: int) -> dict:
    """After a training with checks every 2 steps: columns in use by layer after each step, and the largest
    entry beyond them of any working copy, master or moment.
    """
    session = build(name, layout, rank_check_interval=2, weight_decay=0.1, **settings).start()
    largest, active = 0.0, []
    for _ in range(steps):
        session.train(1)
        active.append({key: layer.active for key, layer in session.engine.layers.items()})
    for layer in session.engine.layers.values():
        for dim, parameter in ((1, layer.U), (0, layer.V)):
            state = read_state(parameter)
            for tensor in (read_value(parameter), state.master, *state.moments.values()):
                unused = tensor.narrow(dim, layer.active, layer.capacity - layer.active)
                largest = max([largest, *unused.abs().flatten().tolist()])
    return {"largest": largest, "active": active}


@torch.no_grad()
def input_moments(session: Session, batches: Iterable[int]) -> dict[str, Tensor]:
    """``E[x x^T]`` of every layer's input over whole global batches, FP64; on one rank alone."""
    inputs = {name: [] for name in session.engine.linears}
    hooks = [
        linear.module.register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0].double())
        )
        for name, linear in session.engine.linears.items()
    ]
    for batch in batches:
        for micro_batch in session.batch(batch):
            Engine.loss(session.engine.model, micro_batch)
    for hook in hooks:
        hook.remove()
    rows = {name: torch.cat(seen, dim=1).flatten(0, 1) for name, seen in inputs.items()}
    return {name: x.t() @ x / len(x) for name, x in rows.items()}


def output_gradients(session: Session, batches: Iterable[int]) -> dict[str, Tensor]:
    """Mean square of every output feature's gradient of the summed loss, FP64; on one rank alone."""
    outputs = {name: [] for name in session.engine.linears}
    hooks = [
        linear.module.register_forward_hook(lambda _, args, out, name=name: outputs[name].append(out[0]))
        for name, linear in session.engine.linears.items()
    ]
    squares = {name: [] for name in outputs}
    for batch in batches:
        for micro_batch in session.batch(batch):
            total = Engine.token_losses(session.engine.model, micro_batch).sum()
            gradients = torch.autograd.grad(total, [seen.pop() for seen in outputs.values()])
            for name, gradient in zip(outputs, gradients, strict=True):
                squares[name].append(gradient.double().flatten(0, 1).square())
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows).mean(dim=0) for name, rows in squares.items()}


def around_restart(
    rank: int, world_size: int, layout: Layout, settings: dict, resets: list[tuple[str, float]]
) -> list[dict]:
    """State, effective weights and loss before and after ReLoRA's first restart, for each way of it."""
    session = build("relora", layout, **settings).start().train(2 * CHECK - 1)
    session.train_step()
    decided, record = session.decide(), engine_record(session.engine)
    before, tensors, loss = states(session), snapshot(session), session.fixed_loss()
    seen = []
    for reset, share in resets:
        load_engine(session.engine, record, Tensors(tensors))
        session.apply([replace(restart, reset=reset, share=share) for restart in decided])
        seen.append(
            {
                "before": before,
                "after": states(session),
                "tensors": (tensors, snapshot(session)),
                "loss": (loss, session.fixed_loss()),
                "steps": engine_record(session.engine)["optimizer_steps"],
            }
        )
    return seen


def around_switch(
    rank: int,
    world_size: int,
    layout: Layout,
    settings: dict,
    truncation: str,
    name: str = "inrank-efficient",
) -> dict:
    """State and effective weights before and after a switch at the first rank check."""
    changes = {"truncation": truncation, "activation_batches": 2}
    session = build(name, layout, switch=CHECK, **settings, **changes).start().train(CHECK - 1)
    session.train_step()
    changes = session.decide()
    growth = [change for change in changes if not isinstance(change, Refactor)]
    session.engine.apply(growth, step=session.step, batches=session.batch)
    before, tensors = states(session), snapshot(session)
    recent = range(CHECK - 2, CHECK)
    moments = input_moments(session, recent) if world_size == 1 else None
    gradients = output_gradients(session, recent) if world_size == 1 else None
    metric = changes[-1].metric
    views = session.engine.views(spectrum=metric, step=session.step, batches=session.batch)
    session.engine.apply(changes[len(growth) :], step=session.step, batches=session.batch)
    return {
        "before": before,
        "after": states(session),
        "tensors": (tensors, snapshot(session)),
        "moments": moments,
        "gradients": gradients,
        "energies": {view.name: view.output_energies for view in views},
        "ranks": dict(session.engine.ranks),
        "steps": engine_record(session.engine)["optimizer_steps"],
    }


def spectra(rank: int, world_size: int, layout: Layout, settings: dict) -> dict:
    """Both spectra at the start, before and after the first growth, with the state that they are of."""
    session = build("inrank", layout, **settings).start()
    seen = {"start": session.spectra()}
    session.train(CHECK - 1)
    session.train_step()
    changes = session.decide()
    for moment in ("before growth", "after growth"):
        seen[moment] = session.spectra() | {"tensors": snapshot(session)}
        session.apply(changes if moment == "before growth" else [])
    return seen


def check_after(rank: int, world_size: int, layout: Layout, poisoned: str) -> str:
    """What a rank check says when one layer's factor U holds a NaN."""
    session = build("inrank", layout).start().train(1)
    with torch.no_grad():
        session.engine.layers[poisoned].U[0, 0] = torch.nan
    try:
        session.spectra()
    except UserError as error:
        return str(error)
    return "no error"


def starts(rank: int, world_size: int, layout: Layout) -> dict:
    """What the first changes leave, and on one rank the gradients that InRank starts from."""
    inrank = build("inrank", layout)
    gradients = dense_gradients(inrank) if world_size == 1 else None
    tensors = {"inrank": snapshot(inrank.start()), "gradients": gradients}
    tensors["absorbed"] = snapshot(build("inrank", layout, absorb_columns=True).start())
    tensors["random"] = snapshot(build("inrank-random", layout).start())
    fixed = build("fixed-rank", layout).start()
    initial = {name: fixed.engine.factory.initial_weight(name) for name in fixed.engine.layers}
    return tensors | {"fixed-rank": snapshot(fixed), "initial": initial}


def dense_gradients(session: Session) -> dict[str, Tensor]:
    """Of the mean loss of batch 0 with respect to every W0 while the factors are empty; on one rank."""
    weights = {name: layer.weight for name, layer in session.engine.layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    losses = [Engine.loss(session.engine.model, batch) for batch in session.batch(0)]
    gradients = torch.autograd.grad(sum(losses) / len(losses), list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return {name: g.double() for name, g in zip(weights, gradients, strict=True)}


def first_losses(
    rank: int, world_size: int, layout: Layout, names: list[str], changes: dict
) -> dict[str, float]:
    """Loss of these methods before their first step."""
    return {name: build(name, layout, **changes).start().fixed_loss() for name in names}


@dataclass(frozen=True)
class Tensors:
    """Whole tensors in memory, as a checkpoint has them."""

    by_name: dict[str, Tensor]
    folder: Path = Path("step_00000001")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.by_name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.by_name[name].shape)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.by_name[name]) for name in names)


# ---- state ---------------------------------------------------------------------------------------------


def snapshot(session: Session) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in whole_tensors(session.engine)}


def leave_and_go_on(
    rank: int, world_size: int, name: str, layout: Layout, steps: int, more: int, settings: dict | None = None
) -> dict:
    """State after ``steps``, the loss on a fixed batch, and the losses of ``more`` steps from there."""
    session = build(name, layout, switch=CHECK + 2, **(settings or {})).start().train(steps)
    record, tensors, fixed = engine_record(session.engine), snapshot(session), session.fixed_loss()
    return {
        "record": record,
        "tensors": tensors if rank == 0 else None,
        "fixed": fixed,
        **_onward(session, more),
    }


def _onward(session: Session, more: int) -> dict:
    """The losses of ``more`` steps, whether the ranks were final before and after, and the record then."""
    before, steps = session.is_final, len(session.losses)
    session.train(more)
    return {
        "losses": session.losses[steps:],
        "switched": (before, session.is_final),
        "last record": engine_record(session.engine),
    }


def resume(
    rank: int,
    world_size: int,
    name: str,
    layout: Layout,
    step: int,
    more: int,
    left: dict,
    settings: dict | None = None,
) -> dict:
    """The same losses from the state that ``leave_and_go_on`` left, and that state as read back at once.

    The fixed batch comes before the first step, as in a resumed run that has only its last evaluation to do.
    """
    session = build(name, layout, switch=CHECK + 2, record=left["record"], **(settings or {}))
    session.step = step

    load_engine(session.engine, left["record"], Tensors(left["tensors"]))
    tensors, record, fixed = snapshot(session), engine_record(session.engine), session.fixed_loss()
    return {
        "record": record,
        "tensors": tensors if rank == 0 else None,
        "fixed": fixed,
        **_onward(session, more),
    }
