"""The full-rank baseline: every linear stays dense."""

from inrank_megatron.lowrank.methods.base import Method


class Dense(Method):
    """Every default of a method."""

    name = "dense"
