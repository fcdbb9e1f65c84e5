"""The one exception type for mistakes that a user can mend."""


class UserError(Exception):
    """A wrong setting, file or launch. The message is one line: the value, the rule, the remedy."""


class Unsupported(UserError):
    """A model that is whole, and that no run can have."""
