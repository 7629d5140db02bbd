"""Times of operations on a graph, and `optimize_for=latency` from the option to the written model."""

import pytest

import ovcalib
from ovcalib.graph.editing import restore
from ovcalib.graph.files import read_graph
from ovcalib.graph.reading import layer_name, quantized_operations
from ovcalib.measurement import counters
from ovcalib.measurement.counters import executed_times, operation_times, owners
from ovcalib.progress import Progress
from ovcalib.quantization import latency_search
from ovcalib.quantization.latency_search import faster_in_float
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.settings import Settings
from ovcalib.runtime import compile_graph


@pytest.fixture(scope="module")
def int8(toy, toy_graph):
    return quantize_default(toy_graph, toy.calibration(), Settings())


def names_of(graph):
    return [op.get_friendly_name() for op in quantized_operations(graph)]


def test_quantizers_belong_to_their_reader_and_the_rest_to_what_they_follow(int8) -> None:
    names = names_of(int8)
    owner = owners(int8, names)
    assert {name: owner[name] for name in names} == {name: name for name in names}
    weighted = [op for op in int8.get_ordered_ops() if op.get_friendly_name() in names and len(op.inputs()) == 2]
    for op in weighted:
        quantizer = op.input_value(0).get_node()
        if quantizer.get_type_name() == "FakeQuantize":
            readers = {port.get_node().get_friendly_name() for port in quantizer.output(0).get_target_inputs()}
            assert owner[quantizer.get_friendly_name()] in readers
        (reader, *_) = [port.get_node() for port in op.output(0).get_target_inputs()]
        if reader.get_type_name() == "Add" and reader.get_friendly_name() not in names:  # a bias
            assert owner[reader.get_friendly_name()] == op.get_friendly_name()


@pytest.mark.parametrize("in_float", [False, True])
def test_times_of_operations_are_those_of_the_whole_graph(int8, toy_graph, in_float, monkeypatch) -> None:
    """Of a convolutional network, little belongs to no operation."""
    counted: dict[str, float] = {}

    def counting(request, seconds):
        counted.update(executed_times(request, seconds))
        return counted

    monkeypatch.setattr(counters, "executed_times", counting)
    names = names_of(int8)
    graph = restore(int8, toy_graph, names) if in_float else int8
    found = operation_times(graph, names, "CPU", 0.1)
    assert found.keys() == set(names)
    assert all(time >= 0 for time in found.values())
    assert 0.3 * sum(counted.values()) < sum(found.values()) < 1.001 * sum(counted.values())


class OneEach(dict[str, float]):
    """A microsecond for every node."""

    def get(self, name, default=None):
        return 1.0


def test_the_time_of_an_operation_has_all_that_serves_it(int8, monkeypatch) -> None:
    monkeypatch.setattr(counters, "executed_times", lambda request, seconds: OneEach())
    names = names_of(int8)
    found = operation_times(int8, names, "CPU", 0.0)
    compiled = compile_graph(int8, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    owner, belonging = owners(int8, names), 0
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        made_from = info["originalLayersNames"].astype(str).split(",") if "originalLayersNames" in info else []
        belonging += any(name in owner for name in made_from)
    executed = compiled.get_runtime_model().get_ops()
    assert belonging < sum(found.values()) <= len(executed)  # with what changes layouts for them
    assert max(found.values()) > 1


def test_no_model_with_a_larger_error_is_taken(int8, toy_graph, monkeypatch) -> None:
    first = layer_name(names_of(int8)[0])
    scripted(monkeypatch, {first: 2.0})
    found, record = faster_in_float(int8, toy_graph, lambda graph: 0.0, "CPU", Progress())
    assert record.in_float == (first,)
    worse = lambda graph: 0.01 if len(names_of(graph)) == len(names_of(int8)) else 0.02  # noqa: E731
    found, record = faster_in_float(int8, toy_graph, worse, "CPU", Progress())
    assert record.in_float == ()
    assert names_of(found) == names_of(int8)
    _, record = faster_in_float(int8, toy_graph, lambda graph: float("nan"), "CPU", Progress())
    assert (record.in_float, record.nmse) == ((), (None, None))
    negligible = lambda graph: 0.0001 if len(names_of(graph)) == len(names_of(int8)) else 0.0002  # noqa: E731
    assert faster_in_float(int8, toy_graph, negligible, "CPU", Progress())[1].in_float == (first,)


def scripted(monkeypatch, gains) -> None:
    """A machine on which a model takes a time for each of its operations in INT8, less where float promises more."""
    monkeypatch.setattr(
        latency_search, "operation_times",
        lambda graph, names, device, seconds: {
            name: 1.0 + (gains.get(layer_name(name), -0.5) if names_of(graph) else 0.0) for name in names
        },
    )  # fmt: skip

    def race(graphs, device, seconds):
        quantized = {key: set(map(layer_name, names_of(graph))) for key, graph in graphs.items()}
        return {key: [10.0 + sum(gains.get(n, -0.5) for n in found)] * 15 for key, found in quantized.items()}

    monkeypatch.setattr(latency_search, "race", race)


def test_operations_that_int8_makes_slower_are_written_in_float(toy, toy_graph, tmp_path, monkeypatch) -> None:
    first, *others = map(layer_name, names_of(quantize_default(toy_graph, toy.calibration(), Settings())))
    scripted(monkeypatch, {first: 2.0})
    made = ovcalib.quantize(
        toy.net, tmp_path / "out", input_shape=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, calib="fractal",
        num_samples=10, benchmark_time=0, optimize_for="latency",
    )  # fmt: skip
    found = made.record.quantization.speed
    assert found.in_float == (first,)
    fastest = 10 - 0.5 * len(others)
    assert found.over_int8 == pytest.approx((fastest + 2) / fastest)
    assert found.over_fp32 == pytest.approx(10 / fastest)
    assert all(nmse is not None and nmse < latency_search.NEGLIGIBLE_NMSE for nmse in found.nmse)
    written = read_graph(tmp_path / "out" / "int8" / "model.xml")
    assert [*map(layer_name, names_of(written))] == others
    assert made.record.quantization.int8_operations == len(others)
    assert f"- in float for speed: {first}\n" in (tmp_path / "out" / "report.md").read_text()
