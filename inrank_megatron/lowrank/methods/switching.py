"""What the methods with a switch have in common: when it comes, at which ranks, and what is refused."""

from typing import ClassVar

from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.base import PhaseShape, Rules, Sections
from inrank_megatron.lowrank.methods.factorising import Factorising
from inrank_megatron.lowrank.methods.switch import SwitchSettings

TRIGGERS = ("switch_iters", "switch_epochs", "switch_patience")
RANK_TARGETS = ("output_threshold", "parameter_budget")


def _outputs_choose(asked):
    inrank = asked.config.inrank
    targets = [name for name in RANK_TARGETS if getattr(inrank, name) is not None]
    if targets and inrank.final_ranks != "output" and asked.free("final_ranks"):
        yield "final_ranks", "output", f"{targets[0]} chooses the ranks by the layers' outputs"


class Switching(Factorising):
    """Every factorised linear becomes ``U* V*`` once.

    ``one_phase``: the method that does the same without a switch. ``triggers``: the settings that say when
    the switch comes; at most one may be given. ``default_final_ranks``: the default of ``final_ranks``.
    """

    settings: ClassVar[Sections] = (*Factorising.settings, SwitchSettings)
    alternatives = (TRIGGERS, RANK_TARGETS)
    adaptations: ClassVar[Rules] = (_outputs_choose, *Factorising.adaptations)
    switches = True
    one_phase: ClassVar[str]
    triggers: ClassVar[tuple[str, ...]] = TRIGGERS
    default_final_ranks: ClassVar[str]

    @classmethod
    def check_settings(cls, run, shapes):
        super().check_settings(run, shapes)
        cls._check_time(run)
        cls._check_final_ranks(run)
        _check_budget(run, shapes)

    @classmethod
    def _check_time(cls, run) -> None:
        inrank, steps = run.inrank, run.training.train_iters
        given = _given(inrank, cls.triggers)
        if len(given) > 1:
            raise UserError(f"{', '.join(given)}: each says when to switch; give one")
        if inrank.switch_iters is not None and inrank.switch_iters >= steps:
            raise UserError(
                f"switch_iters = {inrank.switch_iters}: must be less than train_iters = {steps}; lower "
                f"--switch-iters, raise --train-iters, or give --method {cls.one_phase}"
            )
        if not given and steps == 1:
            raise UserError(
                f"train_iters = 1: leaves no step for the second phase of method {cls.name}; raise "
                f"--train-iters, or give --method {cls.one_phase}"
            )

    @classmethod
    def _check_final_ranks(cls, run) -> None:
        final = run.inrank.final_ranks or cls.default_final_ranks
        given = _given(run.inrank, RANK_TARGETS)
        if len(given) > 1:
            raise UserError(f"{', '.join(given)}: each chooses the ranks; give one")
        if given and final != "output":
            raise UserError(
                f"{', '.join(given)}: chooses the ranks by the layers' outputs, and final_ranks is {final}; "
                "give --final-ranks output, or drop it"
            )

    @classmethod
    def switch_step(cls, run, steps_per_epoch):
        inrank, last = run.inrank, run.training.train_iters - 1
        if inrank.switch_iters is not None:
            step, shown = inrank.switch_iters, f"switch_iters = {inrank.switch_iters}"
        elif inrank.switch_epochs is not None:
            step = max(1, round(inrank.switch_epochs * steps_per_epoch))
            shown = f"switch_epochs = {inrank.switch_epochs:g} ({step} steps at {steps_per_epoch} an epoch)"
        else:
            step, shown = max(1, min(steps_per_epoch, run.training.train_iters // 4)), "train_iters = 1"
        if step > last:
            raise UserError(
                f"{shown}: the switch must come before the last of {last + 1} steps; raise train_iters, "
                f"switch earlier, or give --method {cls.one_phase}"
            )
        return step

    @classmethod
    def phases(cls, run, columns, *, break_even):
        first = super().phases(run, columns, break_even=break_even)
        budget, second = run.inrank.parameter_budget, {"break-even": break_even}
        if budget is not None:  # the mean rank: layers that need more get more
            second = {f"budget {budget:g}": max(1, int(budget * break_even)), **second}
        return [*first, *(PhaseShape(f"phase 2, U V, {name}", rank, rank) for name, rank in second.items())]


def _given(inrank, names: tuple[str, ...]) -> list[str]:
    values = {name: getattr(inrank, name) for name in names}
    return [
        f"{name} = {value:g}" if name in RANK_TARGETS else f"{name} = {value}"
        for name, value in values.items()
        if value is not None
    ]


def _check_budget(run, shapes) -> None:
    budget, m = run.inrank.parameter_budget, run.inrank.rank_multiple_of
    if budget is None:
        return
    dense = sum(out * inp for out, inp in shapes.values())
    needed = sum(min(m, out, inp) * (out + inp) for out, inp in shapes.values())
    if int(budget * dense) < needed:
        raise UserError(
            f"parameter_budget = {budget:g}: is too small for rank {m} in every linear, which takes "
            f"{needed / dense:.3g} of their parameters; raise --parameter-budget or lower "
            "--rank-multiple-of"
        )
