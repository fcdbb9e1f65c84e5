"""What methods share that keep their structure to the end of the run."""


class Unchanging:
    """Looks at no spectrum and changes nothing after the start."""

    def acts_at(self, step):
        return False

    def spectrum_at(self, step, layers):
        return None

    def changes(self, step, layers):
        return []

    def unfinished(self, layers):
        return None
