"""What a job does on a GPU before and next to its training steps."""

import functools

from tests.emulated import jobs
from tests.emulated.device import run_emulated


@functools.cache
def joined() -> jobs.Joined:
    return run_emulated(jobs.joining)


def test_nccl_connects_where_its_errors_have_a_message():
    """It does so at its first collective: that is one of joining, over all ranks, and awaited."""
    first, *others = joined().collectives
    assert (first.name, first.group) == ("allreduce_", "4 ranks") and not others
    assert [wait.place for wait in joined().waits] == ["inrank_megatron.distributed.process_groups:_connect"]


def test_the_store_waits_as_long_as_collectives():
    """NCCL goes through it at each group's first use, also hours after a rank that came in the last second
    of the meeting.
    """
    assert joined().store_seconds == 600


@functools.cache
def stepped() -> jobs.Stepped:
    return run_emulated(jobs.stepping)


def test_zero_3_that_keeps_no_full_parameter_waits_for_its_update():
    """The next forward pass gathers on a stream of its own, which waits for no other."""
    assert stepped().waits["step"][-1].place == "inrank_megatron.engine.fragments:finish_writes"


def test_an_evaluation_waits_at_its_end_and_for_few_questions():
    """Not in each pass: the host makes the places that are scored, and sends them asynchronously."""
    own = [wait.place for wait in stepped().waits["evaluation"] if wait.place.startswith("inrank_megatron.")]
    assert own == ["inrank_megatron.training.evaluate:_mean"] * 2
    assert (stepped().passes, stepped().questions) == (9, 2)
    own = [wait.place for wait in stepped().waits["perplexity"] if wait.place.startswith("inrank_megatron.")]
    # that no rank has failed
    agreed = "inrank_megatron.distributed.process_groups:call_or_raise_on_all_ranks"
    assert own == [agreed, "inrank_megatron.evaluation.perplexity:total_loss"]
