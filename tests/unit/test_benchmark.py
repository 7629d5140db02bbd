"""The arithmetic of the benchmark, on given durations and a scripted clock."""

import math

import numpy as np
import pytest

from ovcalib import machine
from ovcalib.evaluation.metrics import mean_interval, ratio_interval
from ovcalib.measurement import benchmark
from ovcalib.measurement.benchmark import (
    ROUNDS,
    Setting,
    distribution,
    machine_doubts,
    proof_warnings,
    speedups,
    verdict,
)
from ovcalib.measurement.device_parity import likeness
from ovcalib.measurement.worker import Session, is_steady
from ovcalib.records.benchmark import BenchmarkRun, ExecutedNode, Noise
from ovcalib.reports.benchmark import operation_table


def test_percentiles_of_every_inference() -> None:
    found = distribution(np.arange(1, 1002, dtype=np.float32))
    assert (found.p50, found.p90, found.p99, found.p999) == (501, 901, 991, pytest.approx(1000))
    assert (found.min, found.max, found.n) == (1, 1001, 1001)
    assert sum(found.counts) + found.beyond == 1001
    assert found.beyond == 10
    assert distribution(np.ones(999)).p999 is None


def test_students_interval_over_the_rounds() -> None:
    # Mean 3, variance 2.5: half the interval is t * sqrt(2.5 / 5).
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3 - 2.7764 * math.sqrt(0.5), 3 + 2.7764 * math.sqrt(0.5)))


def test_pairing_by_round_cancels_drift() -> None:
    drift = [1.0, 1.5, 2.0, 3.0, 5.0]
    value, low, high = ratio_interval([2 * d for d in drift], drift)
    assert (value, low, high) == pytest.approx((2, 2, 2))
    assert len(drift) == ROUNDS


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((1.5, 1.2, 1.8), "INT8 is faster"),
        ((0.8, 0.7, 0.9), "Do not ship INT8 here"),
        ((1.1, 0.9, 1.3), "no measurable difference"),
    ],
)
def test_only_an_interval_on_one_side_of_one_says_anything(interval, words) -> None:
    assert words in verdict("int8", "CPU", *interval)


def run_of(model, hint, p50_ms, fps, **fields):
    return BenchmarkRun.model_construct(
        model=model, kind=model, device="CPU", hint=hint, precision="default", batch=1, unreliable=(),
        round_p50_ms=(p50_ms,) * ROUNDS, round_fps=(fps,) * ROUNDS, **fields,
    )  # fmt: skip


def test_half_the_latency_and_twice_the_throughput_are_twice_as_fast() -> None:
    runs = [
        run_of(model, hint, *speed)
        for hint in ("latency", "throughput")
        for model, speed in (("int8", (2.0, 600.0)), ("fp32", (4.0, 300.0)))
    ]
    found = speedups(runs)
    assert [(s.model, s.against, s.hint) for s in found] == [
        ("int8", "fp32", "latency"),
        ("int8", "fp32", "throughput"),
    ]
    assert [s.speedup for s in found] == pytest.approx([2, 2])
    assert speedups(runs[:1]) == ()  # nothing to compare with


def test_a_quantized_model_that_ran_in_float_is_named_where_the_device_tells() -> None:
    float_only, unknown, quantized = (
        run_of(kind, "latency", 1.0, 1.0, compute_nodes=nodes, int8_nodes=count)
        for kind, nodes, count in (("int8", {"f32": 3}, 0), ("int8", {}, 0), ("int8", {"i8": 2, "f32": 1}, 2))
    )
    (warning,) = proof_warnings([float_only])
    assert "CPU ran none of its layers in INT8" in warning
    assert (
        proof_warnings(
            [unknown, quantized, run_of("fp32", "latency", 1.0, 1.0, compute_nodes={"f32": 3}, int8_nodes=0)]
        )
        == ()
    )


def test_a_latency_is_steady_when_two_windows_agree() -> None:
    assert not is_steady([1.0] * 39)
    assert is_steady([9.0] * 5 + [1.0] * 40)
    assert not is_steady([1.0] * 20 + [2.0] * 20)


def test_a_noisy_machine_is_named() -> None:
    assert machine_doubts(Noise(busy_before=0.1, steal_share=0.0, throttled=0)) == ()
    doubts = machine_doubts(Noise(busy_before=0.9, steal_share=0.2, throttled=3))
    assert [word in doubt for word, doubt in zip(("90%", "20.0%", "3 times"), doubts, strict=True)] == [True] * 3
    assert machine_doubts(Noise(busy_before=None, steal_share=None, throttled=None)) == ()


def test_stolen_time_is_a_share_of_all_time() -> None:
    before, after = machine.Ticks(100, 60, 10), machine.Ticks(200, 90, 35)
    assert machine.steal_share(before, after) == 0.25
    assert machine.busy_share(before, after) == 0.7
    for share in (machine.steal_share, machine.busy_share):
        assert share(None, after) is None
        assert share(after, after) is None


def test_energy_is_read_from_whole_packages(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(machine, "RAPL", tmp_path)
    assert machine.package_energy_joules() is None
    for zone, energy in (("intel-rapl:0", 3_000_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 9_000_000)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{energy}\n")
    assert machine.package_energy_joules() == 3.5


def test_power_is_energy_over_time() -> None:
    rounds = [{"joules": 6.0, "seconds": 2.0, "inferences": 3}] * 2
    power = benchmark.power_of(rounds)
    assert (power.package_watts, power.joules_per_inference) == (3, 2)
    assert benchmark.power_of([{"joules": -1.0, "seconds": 1, "inferences": 1}]) is None  # the counter wrapped
    assert benchmark.power_of([{"joules": None, "seconds": 1, "inferences": 1}]) is None


def test_settings_become_openvino_properties() -> None:
    assert Setting().config() == {"PERFORMANCE_HINT": "LATENCY"}
    assert Setting(hint="throughput", precision="f32", streams=2, threads=3).config() == {
        "PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "2", "INFERENCE_NUM_THREADS": 3,
    }  # fmt: skip
    assert (Setting().resolved_api, Setting(hint="throughput").resolved_api) == ("sync", "async")


class FakeRequest:
    """An inference that takes `durations` of a scripted clock, one after the other."""

    def __init__(self, clock, durations) -> None:
        self.clock, self.durations, self.latency = clock, iter(durations), 0.0

    def infer(self) -> None:
        self.latency = next(self.durations)
        self.clock.now += (self.latency + 1) / 1000  # a millisecond of dispatch


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def session(durations):
    made = Session.__new__(Session)
    made.clock = Clock()
    made.queue = [FakeRequest(made.clock, durations)]
    made.synchronous = True
    return made


def test_the_loop_measures_the_inference_and_the_call(tmp_path) -> None:
    found = session([1, 2, 3, 4, 99]).measure(0.013, str(tmp_path / "m.npz"))
    assert found["inferences"] == 4  # 2 + 3 + 4 + 5 ms of calls
    with np.load(tmp_path / "m.npz") as arrays:
        assert arrays["latency_ms"].tolist() == [1, 2, 3, 4]
        assert arrays["call_ms"] == pytest.approx([2, 3, 4, 5], abs=1e-3)


def test_the_warm_up_ends_when_the_latency_has_settled() -> None:
    assert session([50.0] * 20 + [1.0] * 100).warm_up(5.0) == {"inferences": 51, "steady": True}  # 11 of 20
    restless = session([float(2**k) for k in range(13)]).warm_up(5.0)
    assert restless == {"inferences": 13, "steady": False}
    assert session([500.0] * 20).warm_up(5.0) == {"inferences": 10, "steady": True}  # too slow for two full windows


def test_a_median_of_few_inferences_is_doubtful():
    def run(inferences):
        measured = {"latency_ms": np.ones(inferences), "call_ms": np.ones(inferences), "seconds": 1.0}
        rounds = [{**measured, "inferences": inferences, "joules": None}] * ROUNDS
        loaded = {"nodes": [], "requests": 1, "effective": {}, "read_ms": 1, "compile_ms": 1, "first_inference_ms": 1}
        finished = {"memory_bytes": None, "memory_reason": "", "compile_cached_ms": None, "compile_cached_reason": ""}
        about = {"kind": "int8", "sha256": "", "size_bytes": 1}
        warm = {"inferences": 9, "steady": True}
        return benchmark.summarise_run("m", about, Setting(), loaded, warm, rounds, finished)

    assert run(5).unreliable == ()
    (doubt,) = run(4).unreliable
    assert "fewer than 5 inferences of m fit into a round" in doubt


def test_likeness_finds_the_worst_image() -> None:
    reference = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    assert likeness(reference, reference) == (pytest.approx(1), 0, 0)
    other = reference.copy()
    other[1, 0] = 0.5
    correlation, worst, difference = likeness(reference, other)
    assert (worst, difference) == (1, 0.5)
    assert 0 < correlation < 1
    other[2, 1] = np.nan
    assert likeness(reference, other) == (None, 2, None)
    assert likeness(reference, np.ones_like(reference))[0] is None


def test_the_conditions_are_read_from_the_system(tmp_path) -> None:
    for i, (name, low, high) in enumerate([("powersave", 800, 3500), ("performance", 400, 4700)]):
        policy = tmp_path / "cpufreq" / f"policy{i}"
        policy.mkdir(parents=True)
        (policy / "scaling_governor").write_text(f"{name}\n")
        (policy / "scaling_min_freq").write_text(f"{low}000\n")
        (policy / "scaling_max_freq").write_text(f"{high}000\n")
    assert machine.governor(tmp_path / "cpufreq") == "performance, powersave"
    assert machine.clock_limits_mhz(tmp_path / "cpufreq") == (400, 4700)
    for i, value in enumerate(["41000", "67500", "asleep"]):
        zone = tmp_path / "thermal" / f"thermal_zone{i}"
        zone.mkdir(parents=True)
        (zone / "temp").write_text(value)
    assert machine.temperature_celsius(tmp_path / "thermal") == 67.5


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ({}, None),
        ({"AC": ("Mains", "1")}, None),
        ({"AC": ("Mains", "1"), "BAT0": ("Battery", None)}, "mains"),
        ({"AC": ("Mains", "0"), "BAT0": ("Battery", None)}, "battery"),
    ],
)
def test_only_a_machine_with_a_battery_has_a_power_source(tmp_path, supplies, expected) -> None:
    for name, (kind, online) in supplies.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "type").write_text(kind)
        if online:
            (tmp_path / name / "online").write_text(online)
    assert machine.power_source(tmp_path) == expected


def test_what_the_system_does_not_tell_is_none(tmp_path) -> None:
    nowhere = tmp_path / "nowhere"
    assert machine.governor(nowhere) is None
    assert machine.clock_limits_mhz(nowhere) is None
    assert machine.temperature_celsius(nowhere) is None
    assert machine.power_source(nowhere) is None
    quiet = Noise(busy_before=None, steal_share=None, throttled=None, power_source="battery")
    assert machine_doubts(quiet) == ("the machine ran on its battery, which may lower the clock",)


def test_the_slowest_operations_stand_side_by_side() -> None:
    def node(name, precision, mean_us):
        return ExecutedNode(name=name, kind="Convolution", precision=precision, primitive="", mean_us=mean_us)

    fp32 = run_of("fp32", "latency", 1.0, 1.0, nodes=(node("a", "f32", 5.0), node("b", "f32", 9.0)))
    int8 = run_of(
        "int8", "latency", 1.0, 1.0,
        nodes=(node("a", "u8", 7.0), node("b", "u8", 2.0), node("conversion", "u8", 1.0), node("gone", "u8", None)),
    )  # fmt: skip
    found = operation_table([fp32, int8], rows=2)
    assert list(found.columns) == ["operation", "kind", "fp32, µs", "fp32, precision", "int8, µs", "int8, precision"]
    assert found.cells == [
        ["b", "Convolution", 9.0, "f32", 2.0, "u8"],
        ["a", "Convolution", 5.0, "f32", 7.0, "u8"],
        ["all operations", "", 14.0, None, 10.0, None],
    ]
    assert operation_table([fp32, int8], rows=3).cells[2] == ["conversion", "Convolution", None, None, 1.0, "u8"]
    uncounted = run_of("fp32", "latency", 1.0, 1.0, nodes=(node("a", "f32", None),))
    assert operation_table([uncounted]).rows == []
