"""What happened to a run: the switch, overflows, spikes of the loss, slow ranks, starts."""

from dataclasses import dataclass
from statistics import fmean, pstdev

from inrank_megatron.reporting.run import Record, Run

WINDOW = 10  # records of steps on either side of the switch
SETTLING = 100  # steps in which FP16 finds its loss scale by overflows


@dataclass(frozen=True)
class SwitchLosses:
    """Training losses around the switch, nats per token.

    Attributes:
        before, after: means of the ``WINDOW`` records next to it; fewer where there are fewer.
        spread: standard deviation of those before.
        back: the first step after the switch up to which the last ``WINDOW`` records average ``before`` or
            less; None if there is none yet.
    """

    before: float
    after: float
    spread: float
    back: int | None

    @property
    def is_clean(self) -> bool:
        """Whether the loss rises by no more than it does from step to step anyway."""
        return self.after - self.before <= self.spread


def switch_losses(run: Run) -> SwitchLosses | None:
    """None without a switch, or with fewer than two losses on a side of it."""
    if run.switch_step is None:
        return None
    known = [record for record in run.train if record.get("loss") is not None]
    before = [record["loss"] for record in known if record["step"] <= run.switch_step][-WINDOW:]
    later = [record for record in known if record["step"] > run.switch_step]
    after = [record["loss"] for record in later]
    if min(len(before), len(after)) < 2:
        return None
    level = fmean(before)
    ends = range(min(WINDOW, len(after)), len(after) + 1)
    back = next(
        (later[end - 1]["step"] for end in ends if fmean(after[max(0, end - WINDOW) : end]) <= level), None
    )
    return SwitchLosses(level, fmean(after[:WINDOW]), pstdev(before), back)


def incidents(run: Run) -> tuple[list[str], list[str]]:
    """What needs a look, and what is only worth knowing, a phrase each."""
    overflows, early = _overflows(run)
    lost = sum(record.get("loss") is None for record in run.train) if not overflows else 0
    slow = {n.get("rank") for n in _notices(run, "straggler") if (n.get("factor") or 0) > 1}
    rolled_back = [n for n in run.notices if n["text"].startswith("rolled back")]
    wrong = {
        f"steps that overflowed after the first {SETTLING}": overflows - early,
        "records without a finite loss": lost,
        "spikes of the loss": len(_notices(run, "loss_spike")),
        "slow ranks": len(slow),
        "rollbacks": len(rolled_back),
    }
    known = {
        "steps that overflowed while FP16 found its loss scale": early,
        "starts from a checkpoint": len(run.resumes),
    }
    return _counted(wrong), _counted(known)


def _overflows(run: Run) -> tuple[int, int]:
    """Steps that were skipped, in all and among the first ``SETTLING``."""
    skipped = [(record["step"], record.get("skipped_steps") or 0) for record in run.train]
    whole = max((count for _, count in skipped), default=0)
    return int(whole), int(max((count for step, count in skipped if step <= SETTLING), default=0))


def _notices(run: Run, kind: str) -> list[Record]:
    return [notice for notice in run.notices if notice["kind"] == kind]


def _counted(counts: dict[str, int]) -> list[str]:
    return [f"{name}: {count:,}" for name, count in counts.items() if count]
