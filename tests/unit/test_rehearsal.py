"""Rehearsals: the time of all the work from its beginning."""

import pytest

from ovcalib import progress
from ovcalib.progress import Rehearsal, Rehearsed, duration
from ovcalib.rehearsal import rehearse


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def worked(total, starting, first, other, taken_up=0):
    """The rehearsal of work that takes `starting`, then `first` for its first step and `other` for each of the rest."""
    clock = Clock()
    rehearsal = Rehearsal(clock=clock)

    def work() -> None:
        with rehearsal.task("work", total) as tick:
            clock.now += starting
            if taken_up:
                tick(taken_up)
            for done in range(taken_up + 1, total + 1):
                clock.now += first if done == taken_up + 1 else other
                tick(done)

    with pytest.raises(Rehearsed):
        work()
    return rehearsal


@pytest.mark.parametrize("other", [0.01, 0.5, 3.0])
def test_the_first_step_counts_once(other) -> None:
    rehearsal = worked(total=1000, starting=2.0, first=1.5, other=other)
    assert rehearsal.seconds == pytest.approx(2 + 1.5 + 999 * other)


def test_no_second_step_is_waited_for_after_a_slow_first_one() -> None:
    rehearsal = worked(total=50, starting=1.0, first=30.0, other=30.0)
    assert rehearsal.seconds == pytest.approx(31 * 50)
    assert rehearsal.share == pytest.approx(1 / 50)


def test_work_that_is_taken_up_again_takes_what_is_left() -> None:
    rehearsal = worked(total=1000, starting=1.0, first=0.2, other=0.2, taken_up=900)
    assert rehearsal.seconds == pytest.approx(1 + 100 * 0.2)


def test_it_ends_in_time() -> None:
    rehearsal = worked(total=10**6, starting=0.0, first=0.25, other=0.25)
    assert rehearsal.share * 10**6 * 0.25 == pytest.approx(progress.REHEARSAL_S)


def test_short_work_is_done_to_its_end() -> None:
    def work(watch):
        with watch.task("work", 3) as tick:
            for done in (1, 2, 3):
                tick(done)
        return "all of it"

    stage, found = rehearse("work", work, progress.Progress())
    assert found == "all of it"
    assert stage.why == "measured"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (3600, "1 h 00 min"), (90000, "25 h 00 min")],
)  # fmt: skip
def test_durations(seconds, text) -> None:
    assert duration(seconds) == text
