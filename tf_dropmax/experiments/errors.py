"""What a user can mend, said in one sentence."""


class UserError(Exception):
    """A wrong argument, a missing file and the like; the command line prints its message and no traceback."""
