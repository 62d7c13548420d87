"""The one exception for mistakes a user can mend; scripts turn it into one line and exit status 2."""


class UserError(ValueError):
    """A mistake the user can mend: the message says what was found, what was expected and what to do."""
