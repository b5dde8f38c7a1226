"""What the commands tell the user: tables, and mistakes in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console


class UserError(Exception):
    """A mistake that a user can correct: a wrong argument, a missing file and the like.

    The command line prints the message and no traceback.
    """


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Context manager in which an `OSError` means that a file cannot be written.

    Args:
        what: String that names the file, the beginning of the message.

    Raises:
        UserError: Instead of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written ({error.strerror or error}).") from error


def wide_console() -> Console:
    """A console that is 250 columns wide when it writes to a file, so that no table wraps."""
    console = Console()
    if not console.is_terminal:
        console.width = 250
    return console
