"""What is printed for a person: numbers, and the console that tables go to."""

from __future__ import annotations

import functools
import shutil

from rich.console import Console

MISSING = "—"


def number(value: float | None) -> str:
    """Four digits after the point of small numbers, none of large ones."""
    if value is None:
        return MISSING
    size = abs(value)
    return f"{value:,.4f}" if size < 20 else f"{value:,.2f}" if size < 1000 else f"{value:,.0f}"


def new_console() -> Console:
    """Standard output for words and tables, where a name is shown as it is: "[/b]" is no markup."""
    plain = functools.partial(Console, highlight=False, markup=False, emoji=False)
    if (console := plain()).is_terminal:
        return console
    # Into a file or pipe the whole table goes, whatever rich believes its width to be.
    return plain(width=max(160, shutil.get_terminal_size().columns))
