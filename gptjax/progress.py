"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere.

jax is imported where it is asked: a command that needs it for nothing else starts without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

# Names and texts of users are shown as they are: "[/b]" is no markup, ":x:" no emoji.
console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(message: str) -> None:
    """A line on standard error, from process 0 alone; a bar in progress stays below it."""
    import jax

    if jax.process_index() == 0:
        console.print(message, soft_wrap=True)


def from_process_0(text: str) -> str:
    """The text that process 0 passed, on every process; all must call it."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return text
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text.encode()))))
    padded = text.encode()[:length].ljust(length, b"\0")  # every process passes as many bytes
    received = multihost_utils.broadcast_one_to_all(np.frombuffer(padded, np.uint8))
    return np.asarray(received).tobytes().decode(errors="replace")


def from_any_process(text: str) -> str:
    """The first text that is not "" of those that the processes passed; all must call it."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return text
    bytes_each = 1000
    padded = np.frombuffer(text.encode()[:bytes_each].ljust(bytes_each, b"\0"), np.uint8)
    texts = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, bytes_each)
    decoded = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in texts]
    return next((text for text in decoded if text), "")


class Progress:
    """A bar of `total` units with a status text beside it.

    Where standard error is no terminal nothing moves: there, `line` is printed instead.

    Args:
        description: stands before the bar.
        total: units of work.
        done: units that are done at the start.
        transient: whether the bar vanishes at the end.
        counted: how units are shown; None: as whole numbers.
    """

    def __init__(
        self,
        description: str,
        total: int,
        done: int = 0,
        transient: bool = False,
        counted: ProgressColumn | None = None,
    ) -> None:
        import jax

        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            counted or MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            transient=transient,
            disable=not console.is_terminal or jax.process_index() != 0,
            expand=True,
        )
        self._task = self._bar.add_task(description, total=total, completed=done, status="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of its own below, while the context lasts; yields how to advance it."""
        task = self._bar.add_task(description, total=total, status="")
        try:
            yield lambda units: self._bar.advance(task, units)
        finally:
            self._bar.remove_task(task)

    def advance(self, units: int) -> None:
        self._bar.advance(self._task, units)

    def status(self, text: str) -> None:
        self._bar.update(self._task, status=text)

    def line(self, text: str) -> None:
        """Said only where no bar shows it."""
        if self._bar.disable:
            say(text)


def readable(values: Mapping[str, float]) -> str:
    """The numbers of a training step as a person reads them."""
    parts = [f"loss {values['loss']:z.4f}"]
    if "reward" in values:
        parts.append(f"reward {values['reward']:.4f}")
    if "sampler_gap" in values:
        parts.append(f"sampler's gap {values['sampler_gap']:.1e}")
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    return "  ".join(parts)
