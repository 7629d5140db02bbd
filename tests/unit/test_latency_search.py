"""The search for operations that float makes faster, on machines whose times are formulas."""

import itertools

import numpy as np
import pytest

from ovcalib.quantization.latency_search import restore_latency, speed_warnings
from ovcalib.records.result import SpeedSearch

ROUNDS = 15


class Machine:
    """Every operation takes a time in INT8 and another in float; a model is the set of its operations in float.

    extra    of a whole model, which counters of single operations do not show
    luck     factor on the times of a model in the first race it takes part in
    """

    def __init__(self, int8, floating, extra=lambda model: 0.0, luck=None) -> None:
        self.int8, self.floating, self.extra, self.luck = int8, floating, extra, dict(luck or {})
        self.races: list[list[int]] = []

    def time(self, model):
        own = sum(self.floating[n] if n in model else self.int8[n] for n in self.int8)
        return own + self.extra(model)

    def gains(self, model, names):
        return {n: (self.int8[n] - self.floating[n]) / self.time(model) for n in names}

    def race(self, models, seconds):
        self.races.append(list(models))
        wobble = 1 + 0.001 * np.arange(ROUNDS)
        return {k: self.time(m) * self.luck.pop(m, 1.0) * wobble for k, m in models.items()}

    def search(self, allowed=lambda model: True):
        return restore_latency(list(self.int8), frozenset, self.gains, allowed, self.race)


def test_the_fastest_of_all_subsets_is_found_where_times_add_up(rng) -> None:
    for _ in range(20):
        names = [f"op{i}" for i in range(7)]
        machine = Machine(*(dict(zip(names, map(float, rng.integers(1, 10, 7)), strict=True)) for _ in range(2)))
        subsets = (frozenset(s) for n in range(len(names)) for s in itertools.combinations(names, n))
        found = machine.search()
        assert machine.time(found.model) == pytest.approx(min(map(machine.time, subsets)))
        assert found.model == frozenset(found.in_float)
        saved = [machine.int8[n] - machine.floating[n] for n in found.in_float]
        assert saved == sorted(saved, reverse=True)


def test_one_operation_stays_quantized() -> None:
    machine = Machine({"a": 5.0, "b": 4.0}, {"a": 1.0, "b": 1.0})
    assert machine.search().in_float == ("a",)


def test_a_promise_that_is_not_kept_changes_nothing() -> None:
    """As where float operations need conversions on both sides."""
    machine = Machine({"a": 5.0, "b": 5.0}, {"a": 4.0, "b": 6.0}, extra=lambda model: 3.0 * len(model))
    assert machine.search().in_float == ()


def test_what_pays_only_after_its_neighbour_is_found_in_another_pass() -> None:

    class Neighbours(Machine):
        def gains(self, model, names):
            return super().gains(model, names) | ({"b": 0.05} if "a" in model and "b" in names else {})

    machine = Neighbours(
        {"a": 5.0, "b": 5.0, "c": 9.0}, {"a": 3.0, "b": 5.5, "c": 12.0},
        extra=lambda model: -1.0 if {"a", "b"} <= model else 0.0,
    )  # fmt: skip
    assert machine.search().in_float == ("a", "b")


def test_what_belongs_to_no_operation_is_saved_by_a_model_with_one_in_int8() -> None:
    """As conversions, which cost the same for one operation in float as for all but one."""
    machine = Machine(
        dict.fromkeys("abcd", 5.0), {"a": 3.0, "b": 5.5, "c": 5.2, "d": 5.7},
        extra=lambda model: 0.0 if len(model) == 3 else 4.0,
    )  # fmt: skip
    assert machine.search().in_float == ("a", "c", "b")
    slower = Machine(dict.fromkeys("abcd", 5.0), dict.fromkeys("abcd", 6.0), lambda model: -90.0 * (len(model) == 3))
    assert slower.search().in_float == ()  # where nothing is promised there is no race
    assert not slower.races


def test_luck_in_one_race_does_not_choose() -> None:
    """The second race has the times that the model always has."""
    machine = Machine({"a": 5.0, "b": 5.0}, {"a": 4.9, "b": 6.0}, lambda model: 0.2 * len(model), {frozenset("a"): 0.5})
    assert machine.search().in_float == ()
    assert len(machine.races) == 2


def test_a_model_with_a_larger_error_is_not_taken() -> None:
    machine = Machine(dict.fromkeys("abcd", 5.0), {"a": 1.0, "b": 2.0, "c": 3.0, "d": 6.0})
    assert machine.search(lambda model: len(model) < 3).in_float == ("a", "b")
    assert machine.search(lambda model: not model).in_float == ()


def test_small_promises_are_not_raced() -> None:
    machine = Machine({"a": 1000.0, "b": 5.0}, {"a": 1100.0, "b": 4.0})
    assert machine.search().in_float == ()
    assert not machine.races


def found(over_fp32, device="CPU"):
    return SpeedSearch(
        device=device, in_float=("a",), over_int8=1.2, over_int8_ci95=(1.1, 1.3), over_fp32=over_fp32,
        over_fp32_ci95=(over_fp32 - 0.1, over_fp32 + 0.1), nmse=(0.1, 0.1),
    )  # fmt: skip


def test_warnings_say_where_the_times_do_not_hold(monkeypatch) -> None:
    monkeypatch.setattr("ovcalib.quantization.latency_search.host_kernels", lambda: "avx2")
    assert speed_warnings(found(1.5), "any") == []
    (equal,) = speed_warnings(found(1.05), "avx2")
    assert "with 1 operations in float the model is no faster than FP32 on CPU" in equal
    assert speed_warnings(found(1.05).model_copy(update={"in_float": ()}), "avx2") == []
    (elsewhere,) = speed_warnings(found(1.5), "vnni")
    assert "no vnni" in elsewhere
    (slower,) = speed_warnings(found(0.5), "any")
    assert "FP32 is faster on CPU" in slower
    assert speed_warnings(found(1.5, device="GPU"), "gpu") == []
