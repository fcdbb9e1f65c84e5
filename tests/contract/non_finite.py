"""Trainings in which a value stops being finite, and what every rank then does and keeps.

Top-level functions that ranks run; the assertions are in ``test_non_finite.py``.
"""

import torch
from torch import Tensor

from inrank_megatron.engine.fragments import read_value, write_value
from inrank_megatron.engine.loss_scaling import STATE
from inrank_megatron.engine.state import engine_record, load_engine
from inrank_megatron.errors import UserError
from tests.contract.checkpoints import Tensors
from tests.contract.layouts import Layout
from tests.contract.probes import snapshot, states
from tests.contract.sessions import Session, build

PARAMETER = "decoder.layers.1.mlp.linear_fc1.U"
MODULE = "decoder.layers.0.input_layernorm"
CULPRIT = 1
CHECK, SWITCHED = 5, 20
"""Steps between two rank checks, and the step of a switch: several steps are taken before each, although the
first loss scales overflow.
"""


def check(session: Session) -> list[int]:
    """Carry out the method's changes after the present step; the ranks then."""
    session.apply(session.decide())
    return list(session.engine.ranks.values())


def plant(session: Session, place: str, value: float, *, here: bool):
    """Make ``place`` non-finite if ``here``; returns what takes it away, where there is such a thing."""
    if place == "parameter":
        parameter = dict(session.engine.parameters())[PARAMETER]
        spoilt = torch.full_like(read_value(parameter), value)  # collective: all ranks read
        if here:
            write_value(parameter, spoilt)
        return None

    def spoil(module, inputs, output):
        if place == "output":
            return output + value
        output.register_hook(lambda gradient: gradient + value)
        return None

    return session.engine.model.get_submodule(MODULE).register_forward_hook(spoil) if here else None


def everything(session: Session) -> dict[str, Tensor]:
    """Working copies, master weights, moments and step counts, without a NaN, which equals nothing."""
    tensors = {
        f"{name}.{key}": tensor for name, state in states(session).items() for key, tensor in state.items()
    }
    tensors |= {f"{name} in use": read_value(p).clone() for name, p in session.engine.parameters()}
    tensors |= {f"steps of {k}": torch.tensor(v) for k, v in session.engine.master_weights.steps().items()}
    return {name: tensor.nan_to_num(nan=12345.0) for name, tensor in tensors.items()}


def different(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before | after if not torch.equal(before[name], after[name])]


def spoilt_steps(rank: int, world_size: int, layout: Layout, settings: dict, value: float) -> dict:
    """For each place: what the step says when it is spoilt on one rank, and what it has changed."""
    seen = {}
    for place in ("parameter", "output", "gradient"):
        session = build("inrank", layout, **settings).start()
        session.train_step()
        plant(session, place, value, here=rank == CULPRIT)
        before = everything(session)
        try:
            message = f"no error: {session.train_step()}"
        except UserError as error:
            message = str(error)
        seen[place] = (message, different(before, everything(session)))
    return seen


def left_out(rank: int, world_size: int, layout: Layout, settings: dict) -> dict:
    """A step whose loss forbids the update: what it changes, and what follows."""
    session = build("inrank", layout, **settings).start()
    session.train_step()
    before = everything(session)
    result = session.train_step(forbids=lambda loss: loss > 0, asks_times=True)
    changed = different(before, everything(session))
    # As if it had never been: the same batch, dropout included, trains now.
    session.step -= 1
    session.train_step()
    after, scaling = everything(session), session.engine.loss_scaling.record()
    other = build("inrank", layout, **settings).start()
    other.train_step()
    other.train_step()
    return {
        "forbidden": result.forbidden and not result.skipped,
        "changed": changed,
        "same scale": scaling == other.engine.loss_scaling.record(),
        "after": different(after, everything(other)),
        "times": result.rank_seconds,
    }


def overflowing(rank: int, world_size: int, layout: Layout, settings: dict, steps: int) -> dict:
    """A training whose first loss scales are far too large, over rank checks; then one spoilt step."""
    session = build(
        "inrank", layout, fp16=True, initial_loss_scale=2.0**40, rank_check_interval=CHECK, **settings
    ).start()
    seen = {name: [] for name in ("skipped", "scales", "losses", "changed", "ranks", "grown_at")}
    seen["losses"].append(session.fixed_loss())
    for _ in range(steps):
        before = everything(session)
        skipped = session.train_step().skipped
        if skipped:
            seen["changed"] += different(before, everything(session))
        if session.step % CHECK == 0:
            seen["ranks"].append((list(session.engine.ranks.values()), check(session)))
            seen["grown_at"].append({layer.spec.grown_at for layer in session.engine.factorised.values()})
        seen["skipped"].append(skipped)
        seen["scales"].append(session.engine.loss_scaling.scale)
    seen["losses"].append(session.fixed_loss())
    seen["counted"] = (session.engine.loss_scaling.skipped, session.engine.loss_scaling.in_a_row)
    hook, before = plant(session, "gradient", torch.inf, here=rank == CULPRIT), everything(session)
    result = session.train_step()
    seen["spoilt"] = (result.skipped, result.grad_norm, different(before, everything(session)))
    if hook:
        hook.remove()
    seen["next"] = session.train_step().skipped
    return seen


def scaling_over_changes(rank: int, world_size: int, layout: Layout, settings: dict) -> dict:
    """The loss scaling's record before and after the switch, and after a resume from there."""
    settings = settings | {"fp16": True, "initial_loss_scale": 2.0**30, "loss_scale_window": 4}
    settings["rank_check_interval"] = CHECK
    session = build("inrank-efficient", layout, switch=SWITCHED, **settings).start()
    skipped = [session.train_step().skipped for _ in range(SWITCHED)]
    records = [engine_record(session.engine)["loss_scaling"]]
    check(session)
    record, tensors = engine_record(session.engine), snapshot(session)
    records.append(record["loss_scaling"])
    goes_on = session.train_step()
    resumed = build("inrank-efficient", layout, switch=SWITCHED, record=record, **settings)
    resumed.step = SWITCHED
    load_engine(resumed.engine, record, Tensors(tensors))
    records.append(engine_record(resumed.engine)["loss_scaling"])
    scaler = resumed.engine.deepspeed.optimizer.loss_scaler
    return {
        "skipped": sum(skipped),
        "records": records,
        "state": {name: getattr(scaler, name) for name in STATE},
        "base": any(x.weight is not None for x in resumed.engine.layers.values()),
        "steps": (goes_on, resumed.train_step()),
    }


def gives_up(rank: int, world_size: int, layout: Layout, settings: dict) -> tuple[int, str]:
    """The step at which a training that always overflows on one rank ends, and what it says."""
    session = build("inrank", layout, fp16=True, **settings).start()
    plant(session, "gradient", torch.inf, here=rank == CULPRIT)
    try:
        while session.step < 10:
            session.train_step()
    except UserError as error:
        return session.step, str(error)
    return session.step, "no error"
