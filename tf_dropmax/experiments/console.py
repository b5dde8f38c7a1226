"""The console that prints the tables."""

from rich.console import Console


def wide_console(width: int) -> Console:
    """A console that is `width` columns wide when it writes to a file, so that no table wraps."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console
