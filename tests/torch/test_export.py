import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from torch import nn

from ovcalib.errors import ModelError
from ovcalib.export.parity import check_parity
from ovcalib.export.to_onnx import refuse_quantized, to_onnx
from ovcalib.graph.files import (
    describe,
    ensure_names,
    graph_sha256,
    is_quantized,
    read_graph,
    stored_spec,
    write_ir,
)
from ovcalib.models.copies import private_copy
from tests.toy import ToyNet


def to_ir(path, spec, dynamic_batch=False):
    graph = read_graph(path)
    describe(graph, spec, dynamic_batch)
    return graph


@pytest.fixture(scope="module")
def exported(toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "toy.onnx"
    to_onnx(toy.net, toy.spec.input_shape, path)
    return path


def test_onnx_is_one_file_with_names(exported) -> None:
    assert [p.name for p in exported.parent.iterdir()] == ["toy.onnx"]
    model = onnx.load(str(exported))
    assert [i.name for i in model.graph.input] == ["input"]
    assert [o.name for o in model.graph.output] == ["logits"]
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert {"stem.0", "block.conv", "down.0", "top.conv", "fc"} <= set(names)


def test_ir_describes_itself(toy, exported, tmp_path) -> None:
    write_ir(to_ir(exported, toy.spec), tmp_path / "m.xml")
    graph = read_graph(tmp_path / "m.xml")
    assert stored_spec(graph) == toy.spec
    info = {key: graph.get_rt_info(["model_info", key]).astype(str) for key in
            ("model_type", "mean_values", "scale_values", "reverse_input_channels", "resize_type", "labels")}  # fmt: skip
    assert info == {
        "model_type": "Classification",
        "mean_values": "127.5 127.5 127.5",
        "scale_values": "63.75 63.75 63.75",
        "reverse_input_channels": "True",
        "resize_type": "standard",
        "labels": "fine-h fine-v wide-h wide-v",
    }
    assert list(graph.inputs[0].get_shape()) == [1, 3, 16, 16]
    assert graph.inputs[0].get_any_name() == "input"


def test_biases_are_constants_so_that_nncf_corrects_them(toy, exported) -> None:
    graph = to_ir(exported, toy.spec)
    kinds = {op.get_type_name() for op in graph.get_ops()}
    assert "ShapeOf" not in kinds
    adds = [op for op in graph.get_ops() if op.get_type_name() == "Add"]
    assert sum(op.input_value(1).get_node().get_type_name() == "Constant" for op in adds) >= 4


def test_an_fp32_baseline_is_fp32(toy, exported, tmp_path) -> None:
    graph = to_ir(exported, toy.spec)
    write_ir(graph, tmp_path / "a" / "m.xml")
    write_ir(graph, tmp_path / "b" / "m.xml", fp16=True)
    parameters = sum(p.numel() for p in toy.net.parameters())
    assert (tmp_path / "a" / "m.bin").stat().st_size > 3.5 * parameters
    assert (tmp_path / "b" / "m.bin").stat().st_size < 0.6 * (tmp_path / "a" / "m.bin").stat().st_size


def test_dynamic_batch_is_open_in_onnx_and_ir(toy, tmp_path) -> None:
    path = tmp_path / "m.onnx"
    to_onnx(toy.net, toy.spec.input_shape, path, dynamic_batch=True)
    graph = to_ir(path, toy.spec, dynamic_batch=True)
    assert str(graph.inputs[0].get_partial_shape()) == "[?,3,16,16]"
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert compiled(np.zeros((5, 3, 16, 16), np.float32))[0].shape == (5, 4)


def test_all_forms_compute_the_same(toy, exported) -> None:
    parity = check_parity(toy.net, exported, to_ir(exported, toy.spec))
    assert parity.torch_vs_ir_max_abs < 1e-4
    assert parity.torch_vs_onnx_max_abs < 1e-4
    assert parity.onnx_runtime == "onnxruntime"


def test_parity_names_the_layer_that_differs(toy, exported, tmp_path) -> None:
    model = onnx.load(str(exported))
    for tensor in model.graph.initializer:
        if tensor.name == "down.0.weight":
            tensor.CopyFrom(onnx.numpy_helper.from_array(1.5 * onnx.numpy_helper.to_array(tensor), tensor.name))
    bad = tmp_path / "bad.onnx"
    onnx.save(model, str(bad))
    with pytest.raises(ModelError, match=r"ONNX differs.*first at layer 'down.0'"):
        check_parity(toy.net, bad, to_ir(exported, toy.spec))


def test_parity_does_not_accept_nan(toy, exported, tmp_path) -> None:
    model = onnx.load(str(exported))
    for tensor in model.graph.initializer:
        if tensor.name == "fc.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(4, np.nan, np.float32), tensor.name))
    onnx.save(model, str(tmp_path / "nan.onnx"))
    with pytest.raises(ModelError, match="differs"):
        check_parity(toy.net, tmp_path / "nan.onnx", to_ir(exported, toy.spec))


def test_parity_without_onnxruntime_uses_openvino(toy, exported, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert check_parity(toy.net, exported, to_ir(exported, toy.spec)).onnx_runtime == "openvino"


def test_the_users_module_stays_as_it_was() -> None:
    net = ToyNet().train()
    net.fc.eval()
    seen = []
    net.fc.register_forward_hook(lambda *args: seen.append(1))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    clone = private_copy(net.half())
    with torch.no_grad():
        clone(torch.zeros(1, 3, 16, 16))
    assert not seen
    assert net.training
    assert not net.fc.training
    assert len(net.fc._forward_hooks) == 1
    assert next(net.parameters()).dtype == torch.float16
    assert all(torch.equal(v, before[k].to(v.dtype)) for k, v in net.state_dict().items())
    assert not clone.training
    assert next(clone.parameters()).dtype == torch.float32


def test_spectral_norm_survives_the_copy() -> None:
    net = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(private_copy(net)(x), net(x))


def test_a_module_that_torch_export_refuses_is_traced(tmp_path) -> None:
    class Refuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            # .numpy() on a traced value breaks torch.export, not the tracer.
            return self.conv(x).mean((2, 3)) * float(np.asarray(x.detach().shape[0]))

    to_onnx(Refuses().eval(), (3, 8, 8), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").exists()


def test_a_module_that_nothing_exports_is_a_model_error(tmp_path) -> None:
    class Hopeless(nn.Module):
        def forward(self, x):
            raise NotImplementedError("no")

    with pytest.raises(ModelError, match="cannot export"):
        to_onnx(Hopeless(), (3, 8, 8), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_an_interruption_that_looks_like_a_fault_of_torch_is_one(tmp_path, monkeypatch) -> None:
    calls = []

    def stopped(*args, dynamo, **kwargs):
        calls.append(dynamo)
        try:
            raise KeyboardInterrupt  # within an import of torch, which then misses a part of itself
        except KeyboardInterrupt:
            raise AttributeError("module 'torch._dynamo' has no attribute 'exc'")  # noqa: B904 (as imports do it)

    monkeypatch.setattr(torch.onnx, "export", stopped)
    with pytest.raises(KeyboardInterrupt):
        to_onnx(ToyNet(), (3, 16, 16), tmp_path / "toy.onnx")
    assert calls == [True]  # tracing would go on


def test_quantized_modules_are_refused() -> None:
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    with pytest.raises(ModelError, match="already quantized"):
        refuse_quantized(quantized)
    refuse_quantized(ToyNet())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "There is no model file"),
        (lambda p: p.write_text("hello"), "cannot be read as ONNX"),
        (lambda p: p.write_bytes(b""), "cannot be read as ONNX"),
    ],
)
def test_files_that_are_no_models_are_refused(tmp_path, make, message, capfd) -> None:
    path = tmp_path / "m.onnx"
    make(path)
    with pytest.raises(ModelError, match=message):
        read_graph(path)
    assert capfd.readouterr().err == ""


def test_truncated_and_missing_weights_are_refused(toy, exported, tmp_path) -> None:
    write_ir(to_ir(exported, toy.spec), tmp_path / "m.xml")
    weights = tmp_path / "m.bin"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read as XML"):
        read_graph(tmp_path / "m.xml")
    weights.unlink()
    with pytest.raises(ModelError, match=r"m.bin' is missing"):
        read_graph(tmp_path / "m.xml")


def test_every_port_gets_a_name(toy) -> None:
    graph = ov.convert_model(toy.net, example_input=torch.zeros(1, 3, 16, 16), input=[1, 3, 16, 16])
    assert not graph.outputs[0].get_names()
    ensure_names(graph)
    assert graph.outputs[0].get_names() == {"output"}


def test_the_graph_hash_is_the_same_for_identical_runs_and_differs_for_others(toy, exported, tmp_path) -> None:
    first, second = to_ir(exported, toy.spec), to_ir(exported, toy.spec)
    assert graph_sha256(first) == graph_sha256(second)
    write_ir(first, tmp_path / "m.xml")
    assert graph_sha256(read_graph(tmp_path / "m.xml")) == graph_sha256(first)
    other = onnx.load(str(exported))
    for tensor in other.graph.initializer:
        if tensor.name == "fc.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + 1, tensor.name))
    onnx.save(other, str(tmp_path / "o.onnx"))
    assert graph_sha256(read_graph(tmp_path / "o.onnx")) != graph_sha256(first)


def test_a_float_graph_that_nncf_has_touched_is_not_quantized(toy, exported) -> None:
    graph = to_ir(exported, toy.spec)
    graph.set_rt_info("True", ["nncf", "friendly_names_were_updated"])
    assert is_quantized(graph) is None
    graph.set_rt_info("x", ["nncf", "quantization", "preset"])
    assert is_quantized(graph) == "nncf/quantization"


def test_describe_overrides_an_open_shape(toy, tmp_path) -> None:
    path = tmp_path / "m.onnx"
    to_onnx(toy.net, toy.spec.input_shape, path, dynamic_batch=True)
    graph = read_graph(path)
    describe(graph, toy.spec)
    assert list(graph.inputs[0].get_shape()) == [1, 3, 16, 16]
