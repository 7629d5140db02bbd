"""Progress: a bar with the time left on a terminal or in a notebook, plain lines on stderr elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ovcalib.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

# Shorter work shows nothing.
DELAY_S = 2.0
PLAIN_EVERY_S = 10.0
BAR_WIDTH = 24


class Task:
    """One piece of work of `total` steps."""

    def __init__(self, owner: Progress, name: str, total: int) -> None:
        self.owner, self.name, self.total = owner, name, total
        self.began = self.printed = time.monotonic()
        # Time and steps of the first report: resumed work starts with some steps done.
        self.first: tuple[float, int] | None = None

    def __call__(self, done: int, note: str = "") -> None:
        """Report `done` steps, and a note."""
        self.owner._update(self, done, note)


class Progress:
    """The default shows nothing; `Terminal` does."""

    def say(self, line: str) -> None:
        """A line for the user."""

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        task = Task(self, name, total)
        try:
            yield task
        finally:
            self._end(task)

    def _update(self, task: Task, done: int, note: str) -> None:
        pass

    def _end(self, task: Task) -> None:
        pass

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Terminal(Progress):
    """Bars where stderr is a terminal and in a notebook, else a line every ten seconds."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.plain = not self.console.is_terminal and not self.console.is_jupyter
        self.bar: _StatusBar | _NotebookBar | None = None

    def say(self, line: str) -> None:
        line = printable(line)
        print(line, file=sys.stderr, flush=True) if self.plain else self.console.print(line, markup=False)

    def _update(self, task: Task, done: int, note: str) -> None:
        now = time.monotonic()
        began, before = task.first = task.first or (now, done)
        if now - task.began < DELAY_S or now - task.printed < (PLAIN_EVERY_S if self.plain else 0.1):
            return
        task.printed = now
        text = f"{task.name} {done}/{task.total}{f', {note}' if note else ''}"
        if done > before:
            text += f", {_duration((now - began) * (task.total - done) / (done - before))} left"
        if self.plain:
            print(text, file=sys.stderr, flush=True)
            return
        if self.bar is None:
            self.bar = _NotebookBar() if self.console.is_jupyter else _StatusBar(self.console)
        self.bar.show(round(BAR_WIDTH * done / max(task.total, 1)), text)

    def _end(self, task: Task) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class _StatusBar:
    """The last line of a terminal."""

    def __init__(self, console: Console) -> None:
        from rich.status import Status

        self.status = Status("", console=console)
        self.status.start()

    def show(self, filled: int, text: str) -> None:
        self.status.update(f"{'━' * filled}[dim]{'━' * (BAR_WIDTH - filled)}[/dim] {text}")

    def stop(self) -> None:
        self.status.stop()


class _NotebookBar:
    """An output of a notebook's cell that is replaced. Bars of rich would need ipywidgets there."""

    def __init__(self) -> None:
        from IPython.display import display

        self.handle: Any = display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, filled: int, text: str) -> None:
        bar = f"{'━' * filled}{'┄' * (BAR_WIDTH - filled)}"
        self.handle.update({"text/plain": f"{bar} {text}"}, raw=True)

    def stop(self) -> None:
        self.handle.update({"text/plain": ""}, raw=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
