"""Progress bars by phase on the terminal; silent when asked to be, or when stderr is not a
terminal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .report import Clock


class Update(Protocol):
    """Advances a bar by ``done`` and sets the note beside it."""

    def __call__(self, done: int, note: str = "") -> None: ...


@dataclass
class Phases:
    """Times every phase and, when ``visible``, shows a bar for it."""

    visible: bool = True
    clock: Clock = field(default_factory=Clock)
    console: Console = field(default_factory=lambda: Console(stderr=True))

    @property
    def shown(self) -> bool:
        """Whether anything appears."""
        return self.visible and self.console.is_terminal

    def say(self, line: str) -> None:
        """Show a line between the bars."""
        if self.shown:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Update]:
        """Time a phase of ``total`` tokens or steps; the yielded call advances it and sets a
        note.
        """
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with (
            self.clock.phase(name),
            Progress(*columns, console=self.console, disable=not self.shown) as bar,
        ):
            task = bar.add_task(name, total=total, note="")

            def update(done: int, note: str = "") -> None:
                bar.update(task, advance=done, note=note)

            yield update

    @contextlib.contextmanager
    def counted(self, name: str, tokens: int) -> Iterator[Callable[[int], None]]:
        """Time a pass over ``tokens`` tokens and count them; the yielded call advances it."""
        with self.phase(name, tokens) as update:
            yield update
        self.clock.count(name, tokens)
