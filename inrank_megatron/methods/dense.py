"""The full-rank baseline: every linear stays dense."""


class Dense:
    name = "dense"
    settings = frozenset()

    @classmethod
    def from_config(cls, config, *, switch_step):
        return cls()

    def structure(self, min_dims):
        return {}

    def start(self):
        return []

    def acts_at(self, step):
        return False

    def spectrum_at(self, step):
        return None

    def changes(self, step, layers):
        return []
