"""Trainings up to one change (start, growth, restart, switch), seen from both sides.

Functions that ranks run; the assertions are in ``test_changes.py``.
"""

from dataclasses import replace
from unittest.mock import patch

from inrank_megatron.config import switch_costs
from inrank_megatron.engine.fragments import read_value
from inrank_megatron.engine.state import engine_record, load_engine
from inrank_megatron.engine.zero_state import ParameterState, read_state, write_state
from inrank_megatron.lowrank.methods.changes import Refactor
from tests.contract.cases import CHECK, SIZES
from tests.contract.checkpoints import Tensors
from tests.contract.layouts import Layout
from tests.contract.probes import dense_gradients, input_moments, output_gradients, snapshot, states
from tests.contract.sessions import build


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
    session.engine.master_weights.set_steps(dict.fromkeys(session.engine.master_weights.steps(), 100_000))
    changes = session.decide()
    active = {name: layer.active_columns for name, layer in session.engine.layers.items()}
    session.apply(changes)
    before = states(session)
    session.train_step()
    updates = [
        (state["master"] - before[name]["master"]).narrow(
            dim, old, session.engine.layers[layer].active_columns - old
        )
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
    active = {name: layer.active_columns for name, layer in session.engine.layers.items()}
    before, loss = states(session), session.fixed_loss()
    session.apply(changes)
    return {
        "before": before,
        "after": states(session),
        "loss": (loss, session.fixed_loss()),
        "active": active,
        "grown": {name: layer.active_columns for name, layer in session.engine.layers.items()},
    }


def beyond_use(rank: int, world_size: int, name: str, layout: Layout, settings: dict, steps: int) -> dict:
    """After a training with checks every 2 steps: columns in use by layer after each step, and the largest
    entry beyond them of any working copy, master or moment.
    """
    session = build(name, layout, rank_check_interval=2, weight_decay=0.1, **settings).start()
    largest, active = 0.0, []
    for _ in range(steps):
        session.train(1)
        active.append({key: layer.active_columns for key, layer in session.engine.layers.items()})
    for layer in session.engine.layers.values():
        for dim, parameter in ((1, layer.U), (0, layer.V)):
            state = read_state(parameter)
            for tensor in (read_value(parameter), state.master, *state.moments.values()):
                unused = tensor.narrow(dim, layer.active_columns, layer.capacity - layer.active_columns)
                largest = max([largest, *unused.abs().flatten().tolist()])
    return {"largest": largest, "active": active}


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


def around_merge(
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
    with patch.object(switch_costs, "WEIGHED_BYTES", 1):  # replicas measure one linear after the other
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
