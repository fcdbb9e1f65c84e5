"""The full-rank baseline: every linear stays dense."""


class Dense:
    name = "dense"

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
