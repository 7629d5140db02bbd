"""Progress: a bar with the time left on a terminal or in a notebook, plain lines on stderr elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
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
# Work that takes longer says how to make it shorter.
LONG_S = 300.0
# A rehearsal ends with the first report after so long; the first report of all it waits for, and for the second one
# only where the first came within the other time.
REHEARSAL_S = 4.0
REHEARSAL_PATIENCE_S = 20.0


class Task:
    """One piece of work of `total` steps."""

    def __init__(self, owner: Progress, name: str, total: int, shorter: str = "") -> None:
        self.owner, self.name, self.total, self.shorter = owner, name, total, shorter
        self.began = self.printed = time.monotonic()
        # When the first report came, and what was done then.
        self.first: tuple[float, float] | None = None

    def __call__(self, done: float, note: str = "") -> None:
        """Report `done` steps, and a word on how it goes.

        Work that is taken up again reports the steps behind it before it makes another.
        """
        self.owner._update(self, done, note)

    def left(self, now: float, done: float) -> tuple[float | None, bool]:
        """Seconds to the end, None where nothing can be said, and whether that is an estimate or only a bound.

        What comes before the first report often takes longer than all steps that follow: models are compiled, memory is
        filled. So the first report gives a bound, and those after it reckon from there.
        """
        since, before = self.first or (self.began, 0.0)
        bound = self.first is None
        if bound:
            self.first = now, done
            if now - self.began < DELAY_S:  # what was done may have been there before
                return None, True
        return (now - since) * (self.total - done) / (done - before) if done > before else None, bound


class Progress:
    """Shows nothing; `Terminal` does."""

    def say(self, line: str) -> None:
        """A line for the user."""

    @contextmanager
    def task(self, name: str, total: int, shorter: str = "") -> Iterator[Task]:
        """A piece of work.

        shorter   how to make it shorter, said once where it takes longer than LONG_S
        """
        task = Task(self, name, total, shorter)
        try:
            yield task
        finally:
            self._end(task)

    def _update(self, task: Task, done: float, note: str) -> None:
        pass

    def _end(self, task: Task) -> None:
        pass

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Rehearsed(BaseException):
    """The end of a rehearsal, which nothing on its way may take for an error."""


class Rehearsal(Progress):
    """Ends a piece of work by raising `Rehearsed` when its reports have told how long all of it would take.

    say       receives lines for the user
    seconds   that the work would take, from its start; None before the first report
    share     of the work that was done, 0..1
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None, clock: Callable[[], float] = time.monotonic):
        self._say, self.clock = say, clock
        self.began = clock()
        self.first: tuple[float, float] | None = None
        self.seconds: float | None = None
        self.share = 0.0

    def say(self, line: str) -> None:
        self._say(line)

    def _update(self, task: Task, done: float, note: str) -> None:
        elapsed = self.clock() - self.began
        self.share = done / max(task.total, 1)
        if self.first is None:
            # The first step of many kinds of work takes longer than the others.
            self.first = (elapsed, done)
            self.seconds = elapsed / self.share if self.share else None
            if elapsed < REHEARSAL_PATIENCE_S:
                return
        before, start = self.first
        if done > start:
            self.seconds = before + (elapsed - before) / (done - start) * (task.total - start)
        if self.seconds is not None and elapsed >= REHEARSAL_S:
            raise Rehearsed


def usual_progress() -> Progress:
    """Progress where somebody looks on: on a terminal or in a notebook; nothing elsewhere."""
    shell = sys.modules.get("IPython")
    kernel = shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None
    return Terminal() if kernel or sys.stderr.isatty() else Progress()


class Terminal(Progress):
    """Bars where stderr is a terminal and in a notebook, else a line every ten seconds.

    words   turns arguments in backquotes into what the user calls them
    """

    def __init__(self, words: Callable[[str], str] = lambda text: text) -> None:
        from rich.console import Console

        self.words = words

        self.console = Console(stderr=True, highlight=False)
        self.plain = not self.console.is_terminal and not self.console.is_jupyter
        self.bar: _StatusBar | _NotebookBar | None = None

    def say(self, line: str) -> None:
        line = printable(self.words(line))
        plain_line(line) if self.plain else self.console.print(line, markup=False)

    def _update(self, task: Task, done: float, note: str) -> None:
        now = time.monotonic()
        left, bound = task.left(now, done)
        if now - task.began < DELAY_S or now - task.printed < (PLAIN_EVERY_S if self.plain else 0.1):
            return
        task.printed = now
        text = f"{task.name} {int(done)}/{task.total}{f', {note}' if note else ''}"
        if left is not None:
            text += f", {'up to ' if bound else ''}{duration(left)} left"
            if task.shorter and not bound and now - task.began + left > LONG_S:
                self.say(f"{task.name} takes about {duration(now - task.began + left)}. Shorter: {task.shorter}")
                task.shorter = ""
        if self.plain:
            plain_line(text)
            return
        if self.bar is None:
            self.bar = _NotebookBar() if self.console.is_jupyter else _StatusBar(self.console)
        self.bar.show(round(BAR_WIDTH * done / max(task.total, 1)), text)

    def _end(self, task: Task) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def plain_line(text: str) -> None:
    """Print a line at once: Ctrl-C between a text and its end would have the next one on the same line."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


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


def duration(seconds: float) -> str:
    """Seconds in words; minutes without seconds from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
