"""The full-rank baseline: every linear stays dense."""

from inrank_megatron.lowrank.methods.unchanging import Unchanging


class Dense(Unchanging):
    name = "dense"
    settings: frozenset[str] = frozenset()

    @classmethod
    def from_config(cls, config, *, switch_step):
        return cls()

    def structure(self, min_dims):
        return {}

    def start(self):
        return []
