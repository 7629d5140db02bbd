"""Progress on stderr: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

# Work that is over sooner shows nothing.
DELAY_S = 2.0
PLAIN_EVERY_S = 10.0


class Task:
    """One piece of work of `total` steps."""

    def __init__(self, owner: Progress, name: str, total: int) -> None:
        self.owner, self.name, self.total = owner, name, total
        self.began = self.printed = time.monotonic()
        # When the first report came, and of how many steps: work that is taken up again starts with steps behind it.
        self.first: tuple[float, int] | None = None

    def __call__(self, done: int, note: str = "") -> None:
        """Report `done` steps, and a word on how it goes."""
        self.owner._update(self, done, note)


class Progress:
    """Shows nothing; `Terminal` does."""

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


def usual_progress() -> Progress:
    """Progress where somebody looks on: on a terminal or in a notebook; nothing elsewhere."""
    shell = sys.modules.get("IPython")
    kernel = shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None
    return Terminal() if kernel or sys.stderr.isatty() else Progress()


class Terminal(Progress):
    """Bars through rich where stderr is a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.plain = not self.console.is_terminal
        self.status: object = None

    def say(self, line: str) -> None:
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
        from rich.status import Status

        if self.status is None:
            self.status = Status(text, console=self.console)
            self.status.start()
        assert isinstance(self.status, Status)
        width = 24
        filled = round(width * done / max(task.total, 1))
        self.status.update(f"{'━' * filled}[dim]{'━' * (width - filled)}[/dim] {text}")

    def _end(self, task: Task) -> None:
        if self.status is not None:
            self.status.stop()  # type: ignore[attr-defined]
            self.status = None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
