"""The one exception type for mistakes that a user can correct."""


class UserError(Exception):
    """A wrong setting, file or launch. The message is one line: the value, the rule, the remedy.

    Line ends in it are those of a name or of a value that it quotes, and become spaces.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


class Unsupported(UserError):
    """A complete model of a kind that no run can have."""
