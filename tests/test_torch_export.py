"""What leaves the process is PyTorch's own: traces and exports, and the way back."""

import copy
import inspect
import pickle
import subprocess
import sys
import warnings

import pytest
from cases import normal
from children import run

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")

nn = torch.nn
# PyTorch's own: of its older exporters, and of quantisation.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def tensor(*shape, seed=0):
    return torch.tensor(normal(*shape, seed=seed)).float()


def network(training=False):
    """Return a model with one layer of each kind that has seen a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.LayerNorm(6),
        nn.RMSNorm(6), nn.BatchNorm2d(8, affine=False),
    )  # fmt: skip
    ours.convert(model).extend([
        ours.SwitchableNorm2d(8), ours.SwitchableNorm2d(8, over=("gn", "bn"), num_groups=2),
        ours.LayerNorm2d(8), ours.Norm((0, 2, 3), shape=8, track_stats=True),
        ours.SwitchableNorm2d(6, axis=-1),
    ])  # fmt: skip
    model(tensor(4, 3, 8, 8, seed=9))
    return model.train(training)


def same_calls(found, model, *xs):
    """Compare outputs and what running statistics become, over some calls."""
    model = copy.deepcopy(model)
    for x in xs:
        torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-5)
    buffers = dict(found.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-5, atol=1e-5)


X, OTHER = tensor(4, 3, 8, 8), tensor(3, 3, 8, 8, seed=1)
training = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def loads_without_numbanorm(path, load):
    """Run a saved program in a process that cannot import numbanorm; return its output of X."""
    torch.save(X, f"{path}.x")
    code = f"""
        import sys
        sys.modules["numbanorm"] = None
        import torch
        x = torch.load({f"{path}.x"!r})
        program = {load.format(path=repr(str(path)))}
        torch.save(program(x), {f"{path}.y"!r})
    """
    command = sys.executable, "-W", "ignore", "-c", inspect.cleandoc(code)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(f"{path}.y")


# -- Traces and exports --------------------------------------------------------------------------


@training
def test_export(training, tmp_path):
    model, sizes = network(training), ({0: torch.export.Dim("n")},)
    program = torch.export.export(copy.deepcopy(model), (X,), dynamic_shapes=sizes)
    assert "numbanorm" not in str(program.graph)
    same_calls(program.module(), model, X, OTHER)
    y = program.module()(X)
    y.sum().backward()
    if not training:
        strict = torch.export.export(model, (X,), strict=True)
        assert "numbanorm" not in str(strict.graph)
        torch.export.save(program, tmp_path / "program.pt2")
        found = loads_without_numbanorm(
            tmp_path / "program.pt2", "torch.export.load({path}).module()"
        )
        assert torch.equal(found, y)


@training
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(training, tmp_path):
    model = network(training)
    traced = torch.jit.trace(copy.deepcopy(model), (X,), check_trace=False)
    assert "numbanorm::" not in str(traced.inlined_graph)
    fresh = torch.jit.trace(network(training), (X,), check_trace=False)
    fresh.load_state_dict(model.state_dict(), strict=False)
    same_calls(fresh, model, X, OTHER)
    traced.save(tmp_path / "traced.pt")
    expected = torch.jit.load(tmp_path / "traced.pt")(X)
    found = loads_without_numbanorm(tmp_path / "traced.pt", "torch.jit.load({path})")
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_takes_images_of_any_size():
    model = ours.convert(nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3)))
    model.append(ours.SwitchableNorm2d(3)).eval()
    traced = torch.jit.trace(copy.deepcopy(model), (X,))
    same_calls(traced, model, tensor(2, 3, 5, 7))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")  # of the exporters themselves
def test_onnx(dynamo, tmp_path):
    pytest.importorskip("onnx", reason="ONNX is not installed: pip install onnx")
    pytest.importorskip("onnxscript", reason="pip install onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    model, path = network(), str(tmp_path / "model.onnx")
    if not dynamo:
        model[6] = nn.Identity()  # the older exporter does not know PyTorch's RMSNorm
    torch.onnx.export(copy.deepcopy(model), (X,), path, dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(X), rtol=1e-4, atol=1e-4)
    # The older exporter passes what a signature has beside input.
    torch.onnx.export(ours.LayerNorm(8), (X,), path, dynamo=dynamo, verbose=False)


def test_the_operator_stays_in_compile():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(network(), backend=keep, fullgraph=True)(X)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("numbanorm.normalize" in target for target in targets) == 11


# -- torch.fx ------------------------------------------------------------------------------------


def test_fx_keeps_a_layer_as_one_node():
    model = network(training=True)
    graph = torch.fx.symbolic_trace(model)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert calls == [str(i) for i in range(13)]
    same_calls(graph, model, X, OTHER)
    same_calls(graph.eval(), model.eval(), X, OTHER)
    again = pickle.loads(pickle.dumps(graph))
    assert torch.equal(again(X), graph(X))


def test_fx_runs_hooks_once():
    class Model(nn.Module):
        """Call a layer in both ways."""

        def __init__(self):
            super().__init__()
            self.norm = ours.LayerNorm(4)

        def forward(self, x):
            return self.norm(input=self.norm(x) + 1)

    model, x = Model(), tensor(3, 4)
    model.norm.register_forward_hook(lambda layer, args, y: y * 3)
    model.norm.register_forward_pre_hook(lambda layer, args: (args[0] ** 2,) if args else None)
    expected = model(x)
    graph = torch.fx.symbolic_trace(model)
    assert [n.op for n in graph.graph.nodes].count("call_module") == 2
    assert torch.equal(graph(x), expected)


def test_fx_of_another_tracer():
    class Tracer(torch.fx.Tracer):
        """Count the layers that it comes to."""

        seen = 0

        def call_module(self, m, forward, args, kwargs):
            self.seen += isinstance(m, nn.BatchNorm2d)
            return super().call_module(m, forward, args, kwargs)

    tracer, model = Tracer(), network()
    graph = torch.fx.GraphModule(model, tracer.trace(model))
    assert tracer.seen == 2
    assert torch.equal(graph(X), model(X))


# -- The way back --------------------------------------------------------------------------------


def small(training=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model(tensor(4, 3, 8, 8, seed=9))
    return model.train(training)


def test_fusion_and_quantisation_after_revert():
    run(fuse_and_quantise)


def fuse_and_quantise():
    warnings.simplefilter("ignore")
    from torch.ao import quantization

    def static(model):
        model = quantization.fuse_modules(model.eval(), [["0", "1", "2"]])
        model = nn.Sequential(quantization.QuantStub(), model, quantization.DeQuantStub())
        model.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
        quantization.prepare(model, inplace=True)
        model(X)
        return quantization.convert(model)

    def qat(model):
        model = quantization.fuse_modules_qat(model.train(), [["0", "1", "2"]])
        model.qconfig = quantization.get_default_qat_qconfig(torch.backends.quantized.engine)
        return quantization.prepare_qat(model)

    for do in (
        torch.jit.script,
        lambda model: quantization.fuse_modules(model.eval(), [["0", "1", "2"]]),
        lambda model: quantization.fuse_modules_qat(model.train(), [["0", "1", "2"]]),
        static,
        qat,
    ):
        expected, found = do(small()), do(ours.revert(ours.convert(small())))
        assert str(found) == str(expected)
        assert torch.equal(found(X), expected(X))


def test_a_reverted_model_loads_without_numbanorm(tmp_path):
    model = ours.convert(small())
    y = ours.revert(model)(X)
    torch.save(model, tmp_path / "model.pt")
    found = loads_without_numbanorm(tmp_path / "model.pt", "torch.load({path}, weights_only=False)")
    assert torch.equal(found, y)
