"""Runs on ranks for test_evaluate_tool: what ``tools/evaluate.py`` does after it has joined the job."""

from inrank_megatron.evaluation.command import evaluate
from tests.groups import join
from tools.evaluate import parse


def evaluations(rank: int, world_size: int, calls: list[list[str]]) -> list[dict]:
    """The record of each call's words."""
    parallel = join(1)
    return [evaluate(parse(words), parallel) for words in calls]
