"""A progress bar while a benchmark runs."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

#: Drawings of the bar per second: rich's own 10 cost a noticeable part of a core while a policy is measured.
_REFRESH_HZ = 2


class Terminal:
    """Steps of known length in seconds, one after the other, on one bar."""

    def __init__(self, console: Console, total_s: float) -> None:
        self.console = console
        self._progress = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            transient=True,
            refresh_per_second=_REFRESH_HZ,
        )
        self._task = self._progress.add_task("", total=total_s)
        self._done_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show the bar."""
        with self._progress:
            yield

    @contextmanager
    def step(self, description: str, length_s: float) -> Iterator["Terminal"]:
        """A part of the work that takes about so long."""
        self._progress.update(self._task, description=description)
        if not self.console.is_terminal:
            self.console.print(description)
        yield self
        self._done_s += length_s
        self._progress.update(self._task, completed=self._done_s)

    def advance(self, within_s: float, description: str) -> None:
        """Where the running step is."""
        self._progress.update(self._task, completed=self._done_s + within_s, description=description)

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, highlight=False, markup=False)

    def warn(self, line: str) -> None:
        """A warning that stays."""
        self.console.print(f"warning: {line}", style="yellow", highlight=False, markup=False)
