"""Compensating rounding against closed forms and exhaustive search, and its windows against the graph's own output."""

import itertools

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovcalib.graph.editing import redirect
from ovcalib.graph.probing import quantized_inputs
from ovcalib.graph.reading import activation_quantizers, integer_weights, quantizable_operations, quantized_layers
from ovcalib.kernels import without_saturation
from ovcalib.quantization import compensation, rounding
from ovcalib.quantization.bias_correction import correct_biases
from ovcalib.quantization.compensation import (
    FullCovariance,
    Moments,
    SampledCovariance,
    bias_shift,
    compensated_rounding,
    output_error,
    rescaled_rounding,
)
from ovcalib.quantization.nncf_backend import quantize_default
from ovcalib.quantization.rounding import Rounding, choose_rounding, input_moments, round_weights
from ovcalib.quantization.settings import Settings
from ovcalib.runtime import Inference, outputs_of

ALMOST_NONE = 1e-9


def rounded(weights, scale, hessian, limit, damping=0.01):
    return compensated_rounding(weights, scale, FullCovariance(hessian).feedback(damping), limit)[0]


def covariance(rng, inputs, samples=None, leading=()):
    """Of correlated inputs; singular where there are fewer samples than inputs."""
    x = rng.normal(size=(*leading, samples or 4 * inputs, inputs)) @ rng.normal(size=(inputs, inputs))
    return x.swapaxes(-1, -2) @ x / x.shape[-2]


def loss(weights, scale, hessian, integers):
    errors = weights - scale[:, None] * integers
    return np.einsum("oi,ij,oj->o", errors, hessian, errors)


def plainly(weights, scale, limit=127):
    return np.clip(np.rint(weights / scale[:, None]), -limit, limit).astype(np.int8)


# One layer ------------------------------------------------------------------------------------


def test_inputs_that_do_not_correlate_leave_plain_rounding(rng) -> None:
    weights, scale = rng.normal(size=(5, 300)), rng.uniform(0.01, 0.03, 5)
    hessian = np.diag(rng.uniform(0.1, 10, 300))
    np.testing.assert_array_equal(rounded(weights, scale, hessian, 127), plainly(weights, scale))


def test_two_weights_in_closed_form(rng) -> None:
    """OBQ: the first is rounded; the second takes what H01 / H11 of the error is, and is rounded."""
    hessian = np.array([[4.0, 2.4], [2.4, 3.0]])
    weights, scale = rng.normal(size=(200, 2)), np.full(200, 0.2)
    exact = weights / scale[:, None]
    first = np.rint(exact[:, 0])
    second = np.rint(exact[:, 1] + (exact[:, 0] - first) * 2.4 / 3.0)
    found = rounded(weights, scale, hessian, 127, ALMOST_NONE)
    np.testing.assert_array_equal(found, np.stack([first, second], 1))
    assert (second != np.rint(exact[:, 1])).any()


def test_the_input_that_varies_most_is_rounded_first() -> None:
    """Its weight is rounded as if alone, wherever it is stored."""
    hessian = np.array([[1.0, 1.5], [1.5, 3.0]])
    found = rounded(np.array([[0.4, 0.4]]), np.ones(1), hessian, 127, ALMOST_NONE)
    np.testing.assert_array_equal(found, [[round(0.4 + 0.4 * 1.5), 0]])


def test_it_is_gptq_by_the_inverse_of_the_hessian(rng) -> None:
    """Frantar et al. 2022, equations 2 and 3, one column at a time, over more columns than one block holds."""
    inputs = compensation.BLOCK + 40
    weights, scale, hessian = rng.normal(size=(3, inputs)), np.full(3, 0.1), covariance(rng, inputs)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(inputs)
    left, exact, expected = list(np.argsort(-np.diag(hessian))), weights / scale[:, None], np.zeros((3, inputs))
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        j = left[0]
        expected[:, j] = np.rint(exact[:, j])
        exact[:, left] -= np.outer((exact[:, j] - expected[:, j]) / inverse[0, 0], inverse[0])
        left.pop(0)
    np.testing.assert_array_equal(rounded(weights, scale, hessian, 127, 0.01), expected)


def test_it_lies_between_plain_rounding_and_the_best_integers_there_are(rng) -> None:
    """The best by exhaustive search over the neighbours of each weight; on average, most of the way."""
    lost = []
    for _ in range(30):
        hessian, weights, scale = covariance(rng, 5), rng.normal(size=(1, 5)), np.full(1, 0.3)
        nearest = plainly(weights, scale)
        best = min(loss(weights, scale, hessian, nearest + np.array([step]))[0]
                   for step in itertools.product((-1, 0, 1), repeat=5))  # fmt: skip
        found = rounded(weights, scale, hessian, 127, ALMOST_NONE)
        lost.append([best, loss(weights, scale, hessian, found)[0], loss(weights, scale, hessian, nearest)[0]])
    best, ours, plain = np.mean(lost, axis=0)
    assert best <= ours <= plain
    assert ours - best < 0.25 * (plain - best)


@pytest.mark.parametrize("samples", [None, 6])
def test_it_errs_less_than_plain_rounding(rng, samples) -> None:
    """Of a singular hessian as well: fewer samples than inputs."""
    weights, scale, hessian = rng.normal(size=(16, 200)), np.full(16, 0.1), covariance(rng, 200, samples)
    found = rounded(weights, scale, hessian, 127, 0.01)
    assert (
        loss(weights, scale, hessian, found).sum() < 0.5 * loss(weights, scale, hessian, plainly(weights, scale)).sum()
    )


@pytest.mark.parametrize("at_once", [1, 100, 10_000])
def test_other_scales_are_taken_where_they_lose_less(rng, monkeypatch, at_once) -> None:
    monkeypatch.setattr(compensation, "VALUES_AT_ONCE", at_once)
    weights, scale, hessian = rng.normal(size=(6, 5)), np.full(6, 0.1), covariance(rng, 5)
    damped = hessian + 0.1 * np.diag(hessian).mean() * np.eye(5)
    integers, chosen = rescaled_rounding(weights, scale, FullCovariance(hessian).feedback(0.1), 20)
    tried = []
    for factor in compensation.SCALES:
        found = rounded(weights, factor * scale, hessian, 20, 0.1)
        tried.append(loss(weights, factor * scale, damped, found))
    np.testing.assert_allclose(loss(weights, chosen, damped, integers), np.min(tried, axis=0))
    np.testing.assert_allclose(chosen, np.array(compensation.SCALES)[np.argmin(tried, axis=0)] * scale)
    assert len(set(chosen)) > 1
    assert 1.0 in compensation.SCALES


@pytest.mark.parametrize("inputs", [5, compensation.BLOCK + 40])
def test_what_is_lost_is_the_quadratic_form_of_the_errors(rng, inputs) -> None:
    weights, scale, hessian = (
        rng.normal(size=(2, 6, inputs)),
        np.full((2, 6), 0.3),
        covariance(rng, inputs, leading=(2,)),
    )
    integers, lost = compensated_rounding(weights, scale, FullCovariance(hessian).feedback(0.1), 3)
    for i in range(2):
        damped = hessian[i] + 0.1 * np.diag(hessian[i]).mean() * np.eye(inputs)
        np.testing.assert_allclose(lost[i], loss(weights[i], scale[i], damped, integers[i]))


def test_damping_without_end_leaves_plain_rounding(rng) -> None:
    weights, scale = rng.normal(size=(4, 20)), np.full(4, 0.1)
    np.testing.assert_array_equal(rounded(weights, scale, covariance(rng, 20), 127, 1e9), plainly(weights, scale))


def test_integers_stay_within_the_limit_and_later_ones_make_up_for_that(rng) -> None:
    weights, scale, hessian = rng.normal(size=(8, 40)), np.full(8, 0.02), covariance(rng, 40)
    found = rounded(weights, scale, hessian, 64)
    assert np.abs(found).max() == 64
    assert loss(weights, scale, hessian, found).sum() < loss(weights, scale, hessian, plainly(weights, scale, 64)).sum()


def test_inputs_that_never_change_leave_plain_rounding(rng) -> None:
    weights, scale = rng.normal(size=(4, 9)), np.full(4, 0.1)
    np.testing.assert_array_equal(rounded(weights, scale, np.zeros((9, 9)), 127), plainly(weights, scale))


def test_leading_axes_are_problems_of_their_own(rng) -> None:
    weights, scale, hessian = (
        rng.normal(size=(6, 2, 9)),
        rng.uniform(0.1, 0.2, (6, 2)),
        covariance(rng, 9, leading=(6,)),
    )
    together = rounded(weights, scale, hessian, 127)
    for i, found in enumerate(together):
        np.testing.assert_array_equal(found, rounded(weights[i], scale[i], hessian[i], 127))


def test_the_shift_and_the_covariance_are_the_least_squares_of_a_column_of_ones(rng) -> None:
    x, errors = rng.normal([1, 2, 3, 4], size=(50, 4)), rng.normal(size=(3, 4))
    moments = Moments(x.mean(0)[None], FullCovariance(np.cov(x.T, bias=True)[None]))
    lost = x @ errors.T
    (shift,), residual, *_ = np.linalg.lstsq(np.ones((50, 1)), lost, rcond=None)
    np.testing.assert_allclose(bias_shift(errors[None], moments)[0], shift)
    np.testing.assert_allclose(output_error(errors[None], moments, moments), residual.sum() / 50)


def test_the_error_on_other_inputs_has_the_shift_that_was_fitted(rng) -> None:
    x, other, errors = rng.normal(size=(50, 4)), rng.normal(size=(30, 4)) + 1, rng.normal(size=(3, 4))
    fitted, seen = (Moments(v.mean(0)[None], FullCovariance(np.cov(v.T, bias=True)[None])) for v in (x, other))
    expected = ((other @ errors.T - (x @ errors.T).mean(0)) ** 2).sum(1).mean()
    np.testing.assert_allclose(output_error(errors[None], fitted, seen), expected)


# Few samples of many inputs --------------------------------------------------------------------


def few_samples(rng, samples, inputs, leading=()):
    return rng.normal(size=(*leading, samples, inputs)) @ rng.normal(size=(inputs, inputs)) / samples**0.5


@pytest.mark.parametrize("inputs", [40, compensation.BLOCK, 2 * compensation.BLOCK + 40])
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_samples_have_the_feedback_of_their_covariance(rng, inputs, damping) -> None:
    """R and D of H itself, from which samples are rounded without it."""
    root = few_samples(rng, 7, inputs, leading=(2,))
    few, full = SampledCovariance(root), FullCovariance(root.swapaxes(-1, -2) @ root)
    np.testing.assert_allclose(few.matrix(), full.values)
    found, expected = few.feedback(damping), full.feedback(damping)
    np.testing.assert_array_equal(found.order, expected.order)
    np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-6)
    np.testing.assert_allclose(np.tril(found.back @ found.rows, -1), np.tril(expected.back, -1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("inputs", [40, 2 * compensation.BLOCK + 40])
def test_samples_are_rounded_as_by_their_covariance(rng, inputs) -> None:
    root, weights, scale = few_samples(rng, 7, inputs, (2,)), rng.normal(size=(2, 5, inputs)), np.full((2, 5), 0.1)
    few, full = SampledCovariance(root), FullCovariance(root.swapaxes(-1, -2) @ root)
    (integers, lost), (expected, expected_lost) = (
        compensated_rounding(weights, scale, h.feedback(0.01), 127) for h in (few, full)
    )
    np.testing.assert_array_equal(integers, expected)
    np.testing.assert_allclose(lost, expected_lost, rtol=1e-6)
    assert not np.array_equal(integers, np.rint(weights / 0.1))
    np.testing.assert_allclose(few.energy(weights), full.energy(weights))
    np.testing.assert_allclose(full.energy(weights), np.einsum("goi,gij,goj->", weights, full.values, weights))


def test_samples_that_are_all_alike_leave_plain_rounding(rng) -> None:
    weights, scale = rng.normal(size=(4, 9)), np.full(4, 0.1)
    feedback = SampledCovariance(np.zeros((3, 9))).feedback(0.01)
    np.testing.assert_array_equal(compensated_rounding(weights, scale, feedback, 127)[0], plainly(weights, scale))


# The inputs of a layer -------------------------------------------------------------------------


STEP, SIZE, CHANNELS = 0.02, (9, 7), 6


def one_layer(rng, kind, limit=127, **attributes):
    """A float layer and the same with NNCF's kind of integers and quantized input: graphs, and the layer's name."""
    shapes = {"conv": (4, CHANNELS, 3, 2), "grouped": (2, 3, 3, 3, 3), "depthwise": (CHANNELS, 1, 1, 3, 3)}
    matmul = kind.startswith("matmul")
    shape = shapes.get(kind) or ((4, 7) if kind == "matmul" else (7, 4))
    weights = rng.normal(size=shape).astype(np.float32)
    axes = {"conv": 1, "grouped": 2, "depthwise": 2}.get(kind)
    scale = np.abs(weights).max(
        tuple(range(axes, weights.ndim)) if axes else (1 if kind == "matmul" else 0), keepdims=True
    ) / limit  # fmt: skip

    def graph(quantized):
        x = ops.parameter([1, CHANNELS, *SIZE], np.float32, "x")
        value, constant = x, ops.constant(weights)
        if quantized:
            ends = [ops.constant(np.full((1, 1, 1, 1), end, np.float32)) for end in (-128 * STEP, 127 * STEP) * 2]
            value = ops.fake_quantize(x, *ends, 256)
            integers = np.rint(weights / scale).astype(np.int8)
            constant = ops.multiply(ops.convert(ops.constant(integers), np.float32), ops.constant(scale))
        if matmul:
            op = ops.matmul(value, constant, False, kind == "matmul")
        else:
            options = {"strides": [1, 1], "pads_begin": [0, 0], "pads_end": [0, 0], "dilations": [1, 1], **attributes}
            op = (ops.convolution if kind == "conv" else ops.group_convolution)(value, constant, **options)
        op.set_friendly_name("layer")
        return ov.Model([op], [x], kind)

    return graph(False), graph(True)


def understood(fp32, int8):
    (layer,) = quantized_layers(int8)
    (found,) = (op for op in quantizable_operations(fp32) if op.name == layer.name)
    return Rounding.of(layer, found.weights)


def pictures(rng, count=3, shape=(1, CHANNELS, *SIZE)):
    return [rng.normal(size=shape).astype(np.float32) for _ in range(count)]


LAYERS = [
    ("conv", {}),
    ("conv", {"strides": [2, 1], "pads_begin": [1, 0], "pads_end": [2, 1]}),
    ("conv", {"dilations": [2, 3], "pads_begin": [1, 2], "pads_end": [0, 1]}),
    ("conv", {"strides": [2, 2], "auto_pad": "same_upper"}),
    ("grouped", {"strides": [1, 2], "pads_begin": [1, 1], "pads_end": [1, 1]}),
    ("depthwise", {"strides": [2, 2], "dilations": [1, 2], "pads_begin": [0, 1], "pads_end": [1, 1]}),
    ("matmul", {}),
    ("matmul turned", {}),
]


@pytest.mark.parametrize(("kind", "attributes"), LAYERS)
def test_weights_times_rows_are_what_the_graph_computes(rng, kind, attributes) -> None:
    fp32, int8 = one_layer(rng, kind, **attributes)
    layer = understood(fp32, int8)
    (x,) = pictures(rng, 1)
    (quantized,) = Inference(quantized_inputs(int8, fp32, ["layer"]))(x)
    rows = layer.rows(quantized, rng)  # every position, in order
    assert rows.shape == (len(layer.exact), layer.positions, layer.exact.shape[-1])
    exact, rounded = layer.exact, layer.scale[..., None] * layer.plain
    for weights, graph, read in ((exact, fp32, quantized.copy()), (rounded, without_saturation(int8), x)):
        (expected,) = Inference(graph)(read)
        expected = expected.reshape(-1, expected.shape[-1]).T if layer.window is None else expected[0]
        computed = weights @ rows.transpose(0, 2, 1)  # [G, O, P]
        np.testing.assert_allclose(computed.reshape(expected.shape), expected, atol=1e-4)


def test_positions_are_a_sample_of_them_all(rng, monkeypatch) -> None:
    layer = understood(*one_layer(rng, "conv"))
    (x,) = pictures(rng, 1)
    every = layer.rows(x, rng)[0]
    monkeypatch.setattr(rounding, "POSITIONS", 5)
    some = layer.rows(x, np.random.default_rng(1))[0]
    assert some.shape == (layer.positions, every.shape[1]) == (5, every.shape[1])
    found = [np.flatnonzero((every == row).all(1)).tolist() for row in some]
    assert len({position for (position,) in found}) == 5
    np.testing.assert_array_equal(some, layer.rows(x, np.random.default_rng(1))[0])
    assert not np.array_equal(some, layer.rows(x, np.random.default_rng(2))[0])


def test_few_samples_take_less_memory_than_a_hessian(rng, monkeypatch) -> None:
    """Two of either, 8 bytes a number, beside the input itself in float32."""
    monkeypatch.setattr(rounding, "POSITIONS", 3)
    layer = understood(*one_layer(rng, "conv"))
    inputs = CHANNELS * 3 * 2
    held = [layer.bytes_held(images) - 4 * CHANNELS * SIZE[0] * SIZE[1] for images in (4, 1000)]
    assert held == [2 * 8 * inputs * 3 * 4, 2 * 8 * inputs**2]


@pytest.mark.parametrize("few", [0.0, np.inf])
@pytest.mark.parametrize("kind", ["conv", "grouped", "depthwise", "matmul"])
def test_moments_are_those_of_all_rows(rng, monkeypatch, kind, few) -> None:
    monkeypatch.setattr(compensation, "FEW_SAMPLES", few)
    fp32, int8 = one_layer(rng, kind)
    layer, images = understood(fp32, int8), pictures(rng)
    graph = quantized_inputs(int8, fp32, ["layer"])
    infer = Inference(graph)
    rows = np.concatenate([layer.rows(infer(x)[0], rng) for x in images], 1).astype(np.float64)
    (moments,) = input_moments(graph, [layer], images, rng)
    assert isinstance(moments.covariance, SampledCovariance if few else FullCovariance)
    np.testing.assert_allclose(moments.mean, rows.mean(1), atol=1e-5)
    for found, group in zip(moments.covariance.matrix(), rows, strict=True):
        np.testing.assert_allclose(found, np.cov(group.T, bias=True), atol=1e-5)


def test_moments_of_inputs_that_hardly_vary_have_a_root(rng) -> None:
    """The logits of near-equal images: in float32, 100 squared leaves nothing of differences of a thousandth."""
    layer = understood(*one_layer(rng, "matmul"))
    images = [100 + 1e-3 * x for x in pictures(rng)]
    given = ops.parameter(images[0].shape, np.float32)
    (moments,) = input_moments(ov.Model([given], [given]), [layer], images, rng)
    rows = np.concatenate([layer.rows(x, rng) for x in images], 1).astype(np.float64)[0]
    np.testing.assert_allclose(moments.covariance.matrix()[0], np.cov(rows.T, bias=True), rtol=0.02, atol=1e-8)
    rescaled_rounding(layer.exact, layer.scale, moments.covariance.feedback(0.01), 127)


@pytest.mark.parametrize("kind", ["conv", "grouped", "depthwise", "matmul", "matmul turned"])
def test_what_is_written_is_read_again(rng, kind) -> None:
    fp32, int8 = one_layer(rng, kind)
    layer = understood(fp32, int8)
    integers = rng.integers(-64, 65, layer.plain.shape).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, layer.scale.shape)
    layer.write(integers, scale)
    again = understood(fp32, int8)
    np.testing.assert_array_equal(again.plain, integers)
    np.testing.assert_allclose(again.scale, scale, rtol=1e-6)


def test_one_scale_for_all_channels_stays(rng) -> None:
    """Where the graph has room for one only, none other is looked for."""
    fp32, int8 = one_layer(rng, "conv")
    (layer,) = quantized_layers(int8)
    layer.op.input_value(1).get_node().input(1).replace_source_output(
        ops.constant(np.full((1, 1, 1, 1), 0.5, np.float32)).output(0)
    )
    found = understood(fp32, int8)
    assert not found.by_channel
    moments = Moments(np.zeros(found.exact.shape[::2]), FullCovariance(covariance(rng, found.exact.shape[-1])[None]))
    ((record, integers, scale),) = choose_rounding([found], moments, moments)
    assert record.kept
    assert not record.rescaled
    found.write(integers, scale)
    np.testing.assert_array_equal(understood(fp32, int8).scale, found.scale)


def test_a_matrix_product_that_turns_its_input_is_left_alone(rng) -> None:
    x = ops.parameter([7, 4], np.float32, "x")
    ends = [ops.constant(np.full((1, 1), end, np.float32)) for end in (-1, 1, -1, 1)]
    integers = ops.convert(ops.constant(rng.integers(-9, 9, (5, 7)).astype(np.int8)), np.float32)
    weights = ops.multiply(integers, ops.constant(np.ones((5, 1), np.float32)))
    graph = ov.Model([ops.matmul(ops.fake_quantize(x, *ends, 256), weights, True, True)], [x], "turned")
    (layer,) = quantized_layers(graph)
    assert Rounding.of(layer, np.ones((1, 5, 7, 1))) is None


# The choice -------------------------------------------------------------------------------------


def test_compensation_is_kept_where_it_helps_unseen_inputs_alone(rng, monkeypatch) -> None:
    monkeypatch.setattr(compensation, "SCALES", (1.0,))
    layer = understood(*one_layer(rng, "conv", limit=7))
    inputs = layer.exact.shape[-1]
    mean = np.zeros((1, inputs))
    few, same = (Moments(mean, FullCovariance(covariance(rng, inputs, samples)[None])) for samples in (4, None))
    ((record, integers, scale),) = choose_rounding([layer], same, same)
    assert record.kept
    assert record.compensated < record.plain
    assert not np.array_equal(integers, layer.plain)
    # What was fitted has nothing to do with what is seen.
    other = Moments(mean, FullCovariance(np.eye(inputs)[None]))
    ((record, integers, scale),) = choose_rounding([layer], few, other)
    assert not record.kept
    assert record.compensated >= record.plain
    np.testing.assert_array_equal(integers, layer.plain)
    np.testing.assert_array_equal(scale, layer.scale)


# The network ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks(toy, toy_graph):
    """FP32, INT8 at half range without bias correction, images to fit, and images to judge by."""
    settings = Settings(bias_correction="none", overflow_fix="enable")
    images = toy.calibration(64).inputs()
    fresh = [toy.spec.preprocessing.normalise(image)[None] for image in toy.images[:64]]
    return toy_graph, quantize_default(toy_graph, toy.calibration(64), settings), images, fresh


def weights_alone(int8):
    """Without activations' quantizers: what is left is the error of rounding weights."""
    graph = without_saturation(int8)
    for quantizer in activation_quantizers(graph):
        redirect(quantizer.output(0), quantizer.input_value(0))
    return graph


def test_a_network_errs_less_than_with_plain_rounding_and_bias_correction(networks) -> None:
    fp32, plain, images, fresh = networks
    shares: list[float] = []
    corrected, compensated = plain.clone(), plain.clone()
    correct_biases(fp32, corrected, images)
    (records,) = round_weights(
        fp32, [compensated], images[8:], np.random.default_rng(0), held_out=images[:8], tick=shares.append
    )
    sizes = np.cumsum([integer_weights(layer)[0].size for layer in quantized_layers(plain)])
    np.testing.assert_allclose(shares, [0, *(sizes / sizes[-1])])
    assert [record.name for record in records] == [layer.name for layer in quantized_layers(plain)]
    assert sum(record.kept for record in records) >= 3
    reference = outputs_of(fp32, fresh)
    before, after = (
        np.mean((outputs_of(weights_alone(graph), fresh) - reference) ** 2) for graph in (corrected, compensated)
    )
    assert after < 0.7 * before


def test_a_quarter_of_the_images_decides_and_is_not_fitted(networks) -> None:
    """Whatever biases were corrected before: they are solved from those of the float graph."""
    fp32, plain, images, fresh = networks
    corrected, expected = plain.clone(), plain.clone()
    correct_biases(fp32, corrected, images)
    round_weights(fp32, [expected], images[:6], np.random.default_rng(rounding.SEED), held_out=images[6:8])
    (found,) = rounding.compensated(fp32, [corrected], images[:8])
    np.testing.assert_array_equal(outputs_of(found, fresh[:4]), outputs_of(expected, fresh[:4]))
    (alone,) = rounding.compensated(fp32, [plain], images[:1])  # one image serves for both
    assert np.isfinite(outputs_of(alone, fresh[:1])).all()


@pytest.mark.parametrize("understood", ["all", "no matrix product"])
def test_graphs_that_differ_in_their_weights_are_rounded_as_each_alone(
    networks, toy, toy_graph, monkeypatch, understood
) -> None:
    """Half and full range: the inputs of a layer, from which it is rounded, are the same."""
    if understood != "all":
        of = Rounding.of
        monkeypatch.setattr(
            Rounding,
            "of",
            staticmethod(lambda layer, w: None if layer.op.get_type_name() == "MatMul" else of(layer, w)),
        )
    fp32, half, images, fresh = networks
    full = quantize_default(toy_graph, toy.calibration(64), Settings(bias_correction="none"))

    def run(*graphs):
        copies = [graph.clone() for graph in graphs]
        records = round_weights(fp32, copies, images[8:24], np.random.default_rng(0), held_out=images[:8])
        return list(zip(records, (outputs_of(graph, fresh[:4]) for graph in copies), strict=True))

    together, alone = run(full, half), run(full) + run(half)
    assert together[0][0] != together[1][0]
    for (records, found), (expected, outputs) in zip(together, alone, strict=True):
        assert records == expected
        np.testing.assert_array_equal(found, outputs)


def test_rows_that_are_rounded_apart_are_those_that_are_rounded_together(networks, monkeypatch) -> None:
    fp32, plain, images, fresh = networks

    def run():
        graph = plain.clone()
        (records,) = round_weights(fp32, [graph], images[8:24], np.random.default_rng(0), held_out=images[:8])
        return [(record.name, record.damping) for record in records], outputs_of(graph, fresh[:4])

    together, expected = run()
    monkeypatch.setattr(compensation, "VALUES_AT_ONCE", 200)
    apart, found = run()
    assert apart == together
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_layer_keeps_its_largest_integer_and_nearly_its_scale(networks) -> None:
    fp32, plain, images, _ = networks
    rounded = plain.clone()
    round_weights(fp32, [rounded], images[8:], np.random.default_rng(0), held_out=images[:8])
    for before, after in zip(quantized_layers(plain), quantized_layers(rounded), strict=True):
        (old, old_scale), (new, new_scale) = integer_weights(before), integer_weights(after)
        ratio = new_scale / old_scale
        assert min(compensation.SCALES) - 1e-6 < ratio.min() <= ratio.max() < max(compensation.SCALES) + 1e-6
        assert np.abs(new.astype(int)).max() <= np.abs(old.astype(int)).max() <= 127


def test_the_seed_decides(networks, monkeypatch) -> None:
    monkeypatch.setattr(rounding, "POSITIONS", 16)
    fp32, plain, images, fresh = networks

    def run(seed):
        graph = plain.clone()
        return round_weights(fp32, [graph], images[8:24], np.random.default_rng(seed), held_out=images[:8]), graph

    (first, graph), (again, same), (other, _) = run(0), run(0), run(1)
    assert first == again
    assert first != other
    np.testing.assert_array_equal(outputs_of(graph, fresh[:4]), outputs_of(same, fresh[:4]))


def test_a_layer_that_is_not_understood_has_its_bias_corrected(networks, monkeypatch) -> None:
    """As bias correction alone would; where no layer is understood, the whole is bias correction."""
    fp32, plain, images, fresh = networks
    monkeypatch.setattr(Rounding, "of", staticmethod(lambda layer, exact: None))
    corrected, rounded = plain.clone(), plain.clone()
    correct_biases(fp32, corrected, images)
    assert round_weights(fp32, [rounded], images, np.random.default_rng(0), held_out=[]) == ((),)
    np.testing.assert_allclose(outputs_of(rounded, fresh[:8]), outputs_of(corrected, fresh[:8]), atol=1e-6)
