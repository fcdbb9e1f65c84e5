"""The six questions and their answers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from inrank_megatron.reporting.glance import answers, flops_share
from inrank_megatron.reporting.run import Run, read_run


def by_question(run: Run) -> dict:
    return {answer.question: answer for answer in answers(run)}


def test_a_low_rank_run(make_run: Callable[..., Path]) -> None:
    found = by_question(read_run(make_run()))
    assert list(found) == [
        "Did it learn?",
        "What ranks?",
        "How sure are the ranks?",
        "What was saved against dense?",
        "Was the switch clean?",
        "Is anything wrong?",
    ]
    assert found["Did it learn?"].state == "good" and "unigram 402" in found["Did it learn?"].text
    ranks = found["What ranks?"]
    assert ranks.text.startswith(
        "mean 12.5 (9 to 16 in 8 layers), from 2.0 at the start; last growth at step 50"
    )
    assert ranks.state == "look" and "a limit stopped the growth in 1 of 8 layers" in ranks.text
    assert "thresholds of 0.85 / 0.9 / 0.95 ask for mean ranks of" in found["How sure are the ranks?"].text
    saved = found["What was saved against dense?"].text
    assert (
        "62% of the dense model's parameters; 62% of its FLOPs per token, 76% over the whole training"
        in saved
    )
    assert "; predicted memory per device: dense 50.9 MiB / phase 1 52.5 MiB / phase 2 38.7 MiB; " in saved
    assert "; measured peak allocated: phase 1 3.00 GiB; 1:12 of training, phase 2 at 1.24 times" in saved
    assert saved.endswith(" the speed of phase 1; dense was not timed")
    assert (
        found["Was the switch clean?"].state == "good"
        and "step 60 in 1.2 s" in found["Was the switch clean?"].text
    )
    assert found["Is anything wrong?"].state == "good"


def test_a_dense_run_has_no_ranks(make_run: Callable[..., Path]) -> None:
    assert list(by_question(read_run(make_run(method="dense")))) == ["Did it learn?", "Is anything wrong?"]


def test_a_run_that_predicts_worse_than_frequencies(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run())
    answer = by_question(replace(run, summary=run.summary | {"unigram_perplexity": {"valid": 20.0}}))
    assert answer["Did it learn?"].state == "look"


def test_ranks_that_untrained_factors_would_have(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run())
    ranks = [record | {"rank": 64} for record in run.ranks]
    answer = by_question(replace(run, ranks=ranks))["How sure are the ranks?"]
    assert answer.state == "plain" and "which this run does not judge by" in answer.text
    released = replace(run, ranks=ranks, settings=run.settings | {"rank_criterion": "released"})
    answer = by_question(released)["How sure are the ranks?"]
    assert answer.state == "look" and "these ranks say little about the data" in answer.text
    released = replace(released, ranks=run.ranks)
    assert by_question(released)["How sure are the ranks?"].state == "good", "ranks of 9 to 16"


def test_a_larger_model_is_no_saving(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run(steps=47))
    flops = {"dense": 100, "phase_1": 130, "phase_2": None}
    answer = by_question(replace(run, summary={"flops_per_token": flops}))["What was saved against dense?"]
    assert answer.state == "look" and "130% of its FLOPs per token" in answer.text


def test_a_dense_phase_is_what_the_second_phase_is_timed_against(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run())
    train = [record | {"phase": 0 if record["phase"] == 1 else 2, "peak_rss": 2**30} for record in run.train]
    summary = run.summary | {"peak_memory": {}}
    answer = by_question(replace(run, train=train, summary=summary))["What was saved against dense?"]
    assert answer.text.endswith("phase 2 at 1.24 times the speed of the dense phase")
    assert "measured peak of a process, libraries included: dense 1.00 GiB / phase 2 1.00 GiB" in answer.text


def test_flops_count_each_phase_by_its_tokens(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run())
    assert flops_share(run) == pytest.approx((14.1 + 9.8) / 2 / 15.7)
