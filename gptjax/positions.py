"""Where processes are, as they say themselves, and who of them is silent or hangs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

SILENT_SECONDS = 3.0  # who has said nothing for so long is named, should the job be ending


class Position(NamedTuple):
    """Where a process is, as it says itself.

    Attributes:
        beat: grows each second.
        moves: grows whenever the main thread has got on. All processes run the same program, so
            who has fewer is behind.
        patience: seconds for which it may not move; None: not watched.
        left: status and words of a process that has ended by an error of its own.
    """

    host: str
    beat: int = 0
    moves: int = 0
    doing: str = "starting"
    step: int | None = None
    patience: float | None = None
    left: tuple[int, str] | None = None


class Seen(NamedTuple):
    """A process as another sees it; times are the seer's, so that no clocks are compared."""

    position: Position
    beaten: float  # when its beat last changed, in seconds
    moved: float  # and its moves

    @classmethod
    def first(cls, position: Position, now: float) -> Seen:
        return cls(position, now, now)

    def again(self, position: Position, now: float) -> Seen:
        beaten = self.beaten if position.beat == self.position.beat else now
        return Seen(position, beaten, self.moved if position.moves == self.position.moves else now)


def silent(seen: Sequence[Seen], now: float) -> list[int]:
    """The processes that have said nothing for a while."""
    return [i for i, s in enumerate(seen) if now - s.beaten > SILENT_SECONDS]


def hung(seen: Sequence[Seen], now: float) -> list[int]:
    """Those for which the others wait, once each has not moved for longer than its patience.

    They are those behind, by their count of moves: a process that is ahead waits for them, however
    long it does.
    """
    least = min(s.position.moves for s in seen)
    behind = [i for i, s in enumerate(seen) if s.position.moves == least]
    patience = [seen[i].position.patience for i in behind]
    stuck = [
        p is not None and now - seen[i].moved > p for i, p in zip(behind, patience, strict=True)
    ]
    return behind if all(stuck) else []


def describe(index: int, position: Position) -> str:
    """ "process 1 on host7, at step 20 (training)"."""
    at = "" if position.step is None else f"at step {position.step} "
    return f"process {index} on {position.host}, {at}({position.doing})"


def listed(names: Sequence[str]) -> str:
    """Three of them, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "; ".join(names[:3]) + more


def position_of(fields: Sequence[Any]) -> Position:
    position = Position(*fields)
    return position._replace(
        left=None if position.left is None else (position.left[0], position.left[1])
    )
