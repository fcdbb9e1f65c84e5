"""A run at a glance: six questions that everybody has of a run, each with an answer of a line."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from inrank_megatron.reporting.console import duration
from inrank_megatron.reporting.incidents import incidents, switch_losses
from inrank_megatron.reporting.learnt import beside_dense, has_learnt, size, verdict
from inrank_megatron.reporting.predicted import predicted_memory
from inrank_megatron.reporting.run import Run, flops_spent
from inrank_megatron.reporting.sureness import mean_ranks_by_threshold, untrained_rank
from inrank_megatron.reporting.tables import median, memory_table, peaks, shown_bytes

CLOSE = 0.1  # a rank this near to the untrained one, relatively, is not told from it


State = Literal["good", "look", "plain"]


class Answer(NamedTuple):
    """``state``: ``good``; ``look``, which deserves a look; ``plain``, a fact or nothing known."""

    question: str
    text: str
    state: State = "plain"


def answers(run: Run) -> list[Answer]:
    """Those that the run's records allow; a dense run has neither ranks nor a switch."""
    asked = (_learnt(run), _ranks(run), _sure(run), _saved(run), _switch(run), _wrong(run))
    return [answer for answer in asked if answer is not None]


def _learnt(run: Run) -> Answer | None:
    known = has_learnt(run)
    text = verdict(run)
    if not text:
        return Answer("Did it learn?", "no validation yet")
    text = "; ".join(filter(None, (text, beside_dense(run))))
    return Answer("Did it learn?", text, "plain" if known is None else "good" if known else "look")


def _ranks(run: Run) -> Answer | None:
    layers = run.ranks_by_layer()
    if not layers:
        return None
    first, last = ([records[place]["rank"] for records in layers.values()] for place in (0, -1))
    grown = [
        r["step"] for r in run.ranks if r["event"] == "check" and r["rank"] > (r.get("previous_rank") or 0)
    ]
    capped = sum(any(record.get("capped") for record in records) for records in layers.values())
    parts = [
        f"mean {sum(last) / len(last):.1f} ({min(last)} to {max(last)} in {len(last)} layers), "
        f"from {sum(first) / len(first):.1f} at the start",
        f"last growth at step {max(grown):,}" if grown else "",
        f"a limit stopped the growth in {capped} of {len(layers)} layers" if capped else "",
    ]
    return Answer("What ranks?", "; ".join(filter(None, parts)), "look" if capped else "plain")


def _sure(run: Run) -> Answer | None:
    if not any(record["event"] == "check" for record in run.ranks):
        return None  # ranks that nobody measured
    last = [records[-1]["rank"] for records in run.ranks_by_layer().values()]
    mean, untrained, by_threshold = sum(last) / len(last), untrained_rank(run), mean_ranks_by_threshold(run)
    parts: list[str] = []
    state: State = "plain"
    if untrained is not None:
        judged = run.settings.get("rank_criterion") == "released"
        remark = "" if judged else ", which this run does not judge by"
        parts.append(f"untrained factors would come to {untrained:.1f} by the released criterion{remark}")
        if judged:
            state = "look" if abs(mean / untrained - 1) < CLOSE else "good"
        if state == "look":
            parts.append("these ranks say little about the data")
    if by_threshold:
        ranks = " / ".join(f"{rank:.1f}" for rank in by_threshold.values())
        at = " / ".join(f"{threshold:g}" for threshold in by_threshold)
        parts.append(f"by the last spectra, thresholds of {at} ask for mean ranks of {ranks}")
    return Answer("How sure are the ranks?", "; ".join(parts) or "not known from these records", state)


def _saved(run: Run) -> Answer | None:
    """What the run cost against a dense one of its shape: the counts exactly, memory by the arithmetic of
    ``--dry-run``. What was measured is the run's own; dense is not timed unless a phase was.
    """
    if not run.ranks:
        return None
    parts = [size(run).split(", mean")[0]] if "parameters" in size(run) else []
    last = run.last_cost("flops_per_token")
    dense = (run.summary.get("flops_per_token") or {}).get("dense")
    if last and dense:
        whole = flops_share(run)
        of_all = f", {whole:.0%} over the whole training" if whole else ""
        parts.append(f"{last / dense:.0%} of its FLOPs per token{of_all}")
    parts += [text for text in (_memory(run), _time(run)) if text]
    share = last / dense if last and dense else None
    state: State = "plain" if share is None else "good" if share < 1 else "look"
    return Answer("What was saved against dense?", "; ".join(parts) or "not known yet", state)


def _memory(run: Run) -> str:
    predicted, measured = (_by_phase(sizes) for sizes in (predicted_memory(run), peaks(run)))
    parts = [f"predicted memory per device: {predicted}"] if predicted else []
    if measured:
        of_gpu = "allocated" in memory_table(run).heads
        what = "allocated" if of_gpu else "of a process, libraries included"
        parts.append(f"measured peak {what}: {measured}")
    return "; ".join(parts)


def _by_phase(sizes: Mapping[str, float]) -> str:
    return " / ".join(f"{phase.replace('_', ' ')} {shown_bytes(size)}" for phase, size in sizes.items())


def _time(run: Run) -> str:
    if run.elapsed_seconds is None:
        return ""
    dense, first, second = (
        median([record for record in run.train if record["phase"] == phase], "tokens_per_second")
        for phase in (0, 1, 2)
    )
    parts = [f"{duration(run.elapsed_seconds)} of training"]
    if second and (before := dense or first):
        name = "the dense phase" if dense else "phase 1"
        parts.append(f"phase 2 at {second / before:.2f} times the speed of {name}")
    return ", ".join(parts) + ("" if dense else "; dense was not timed")


def _switch(run: Run) -> Answer | None:
    if run.switch_step is None:
        return Answer("Was the switch clean?", "there was none yet") if run.ranks else None
    losses, at = switch_losses(run), f"step {run.switch_step:,}"
    seconds = run.switches[-1].get("seconds")
    if losses is None:
        return Answer("Was the switch clean?", f"{at}; too few losses around it to say")
    took = f" in {seconds:.1f} s" if seconds is not None else ""
    text = f"{at}{took}: mean training loss {losses.before:.3f} before, {losses.after:.3f} after"
    size = run.switches[-1].get("size")
    kept = f"; {size}" if size else ""
    if losses.is_clean:
        return Answer("Was the switch clean?", f"yes, {text}{kept}", "good")
    back = f"back by step {losses.back:,}" if losses.back else "not back yet"
    text += (
        f", {(losses.after - losses.before):.3f} more (spread from step to step {losses.spread:.3f}); {back}"
    )
    return Answer("Was the switch clean?", f"the loss jumps: {text}{kept}", "look")


def _wrong(run: Run) -> Answer:
    wrong, known = incidents(run)
    said = [
        "; ".join(wrong) if wrong else "nothing on record: no late overflow, spike, slow rank or rollback"
    ]
    return Answer("Is anything wrong?", "; ".join([*said, *known]), "look" if wrong else "good")


def flops_share(run: Run) -> float | None:
    """FLOPs of the recorded training over those of a dense one of as many tokens; None where not known."""
    spent, dense = flops_spent(run), (run.summary.get("flops_per_token") or {}).get("dense")
    return spent[-1] / (run.train[-1]["tokens"] * dense) if spent and dense else None
