"""The record keeper: strict JSON lines, TensorBoard tags, and a resume that repeats nothing."""

import json
import math
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from inrank_megatron.errors import UserError
from inrank_megatron.reporting.metrics import MetricsWriter


def _lines(path: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def _train(writer: MetricsWriter, steps: range, *, loss: float = 5.0) -> None:
    for step in steps:
        writer.train(step, loss=loss, perplexity=math.exp(loss), lr=1e-3, mean_rank=2.0, phase=1)
        writer.ranks([{"step": step, "event": "check", "layer": "a.0.linear_fc1", "rank": step}])


def _scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def _next_second() -> None:
    """TensorBoard reads the files of one second in the order of their names, not of their making."""
    time.sleep(1.01 - time.time() % 1)


def test_every_line_is_on_disk_before_close(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=None)
    _train(writer, range(1, 4))
    assert [line["step"] for line in _lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [line["rank"] for line in _lines(tmp_path / "ranks.jsonl")] == [1, 2, 3]
    writer.close()
    writer.close()


def test_non_finite_values_become_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=None)
    writer.train(1, loss=math.nan, perplexity=math.inf, phase=0)
    writer.ranks(
        [{"step": 1, "event": "check", "layer": "a", "rank": 2, "singular_values": [1.0, -math.inf]}]
    )
    writer.close()
    [line] = _lines(tmp_path / "metrics.jsonl")
    assert line == {"kind": "train", "step": 1, "loss": None, "perplexity": None, "phase": 0}
    assert _lines(tmp_path / "ranks.jsonl")[0]["singular_values"] == [1.0, None]


def test_evaluations_and_events_have_their_kind(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=None)
    for split, loss in (("valid", 4.0), ("test", 4.5)):
        writer.evaluation(
            7,
            split=split,
            loss=loss,
            perplexity=math.exp(loss),
            word_perplexity=None,
            tokens=99,
            elapsed_seconds=0.5,
        )
    writer.event("checkpoint", 7, path="checkpoints/step_00000007", seconds=0.1)
    writer.close()
    lines = _lines(tmp_path / "metrics.jsonl")
    assert [line["kind"] for line in lines] == ["eval", "eval", "checkpoint"]
    assert lines[2]["path"] == "checkpoints/step_00000007"
    assert _scalars(tmp_path, "lm loss validation") == [(7, 4.0)]
    assert _scalars(tmp_path, "lm loss validation ppl") == [(7, pytest.approx(math.exp(4.0)))]
    assert _scalars(tmp_path, "lm loss test") == [(7, 4.5)]


@pytest.mark.parametrize("torn", ["", '{"kind": "train", "step": 4, "lo', '{"kind": "train", "step": 6}'])
def test_a_resumed_run_repeats_no_step(tmp_path: Path, torn: str) -> None:
    first = MetricsWriter(tmp_path, resume_step=None)
    _train(first, range(1, 6))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(torn)
    _next_second()
    second = MetricsWriter(tmp_path, resume_step=3)
    _train(second, range(4, 7), loss=3.0)
    second.close()
    lines = _lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [
        *((step, 5.0) for step in (1, 2, 3)),
        *((step, 3.0) for step in (4, 5, 6)),
    ]
    assert [line["step"] for line in _lines(tmp_path / "ranks.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert _scalars(tmp_path, "lm loss") == [(line["step"], line["loss"]) for line in lines]
    assert [step for step, _ in _scalars(tmp_path, "rank/a.0.linear_fc1")] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "ranks.jsonl", "tensorboard"]


def test_a_resume_at_step_0_starts_the_records_again(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path, resume_step=None)
    first.ranks([{"step": 0, "event": "init", "layer": "a", "rank": 2}])
    first.close()
    _next_second()
    second = MetricsWriter(tmp_path, resume_step=0)
    second.ranks([{"step": 0, "event": "init", "layer": "a", "rank": 2}])
    second.close()
    assert len(_lines(tmp_path / "ranks.jsonl")) == 1


def test_a_new_run_does_not_append_to_another(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path, resume_step=None)
    _train(first, range(1, 3))
    first.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl already holds .* --resume auto"):
        MetricsWriter(tmp_path, resume_step=None)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
