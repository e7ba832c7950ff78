"""The operator under PyTorch: gradcheck, torch.compile, torch.export, torch.func, threads."""

import copy
import threading

import numba
import pytest
from cases import assert_close, normal

import numbanorm
from numbanorm.core.layouts import elements, groups, pieces
from numbanorm.numba_ext import launch as _launch
from numbanorm.numba_ext import threads as _threads

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from numbanorm.torch import ops, private  # noqa: E402
from numbanorm.tuning import use  # noqa: E402

from_func = torch.func
NORMALIZE = torch.ops.numbanorm.normalize.default

# PyTorch's own: forward-mode derivatives and torch.compile still load parts of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def tensor(*shape, seed=0, dtype=torch.float64):
    return torch.tensor(normal(*shape, seed=seed)).to(dtype)


def filled(layer):
    """Fill a layer with random numbers, in float64."""
    layer, generator = layer.double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(generator=generator)
        for buffer in layer.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2, generator=generator)
    return layer


LAYERS = {
    "BatchNorm1d": (lambda: ours.BatchNorm1d(3), (4, 3)),
    "BatchNorm2d": (lambda: ours.BatchNorm2d(3), (2, 3, 2, 2)),
    "BatchNorm2d-evaluation": (lambda: ours.BatchNorm2d(3).eval(), (2, 3, 2, 2)),
    "BatchNorm2d-plain": (lambda: ours.BatchNorm2d(3, affine=False), (2, 3, 2, 2)),
    "SyncBatchNorm": (lambda: ours.SyncBatchNorm(3), (2, 3, 4)),
    "InstanceNorm1d": (lambda: ours.InstanceNorm1d(2, affine=True), (2, 2, 3)),
    "InstanceNorm1d-sample": (lambda: ours.InstanceNorm1d(2), (2, 4)),
    "InstanceNorm1d-evaluation": (
        lambda: ours.InstanceNorm1d(2, affine=True, track_running_stats=True).eval(), (2, 2, 3),
    ),
    "LayerNorm": (lambda: ours.LayerNorm(4), (3, 4)),
    "LayerNorm-axes": (lambda: ours.LayerNorm((2, 3)), (2, 2, 3)),
    "LayerNorm-plain": (lambda: ours.LayerNorm(4, elementwise_affine=False), (3, 4)),
    "LayerNorm-scale": (lambda: ours.LayerNorm(4, bias=False), (3, 4)),
    "GroupNorm": (lambda: ours.GroupNorm(2, 4), (2, 4, 3)),
    "RMSNorm": (lambda: ours.RMSNorm(4), (3, 4)),
    "SwitchableNorm1d": (lambda: ours.SwitchableNorm1d(3), (4, 3)),
    "SwitchableNorm2d": (lambda: ours.SwitchableNorm2d(3), (2, 3, 2, 2)),
    "SwitchableNorm2d-evaluation": (lambda: ours.SwitchableNorm2d(3).eval(), (2, 3, 2, 2)),
    "SwitchableNorm2d-groups": (
        lambda: ours.SwitchableNorm2d(4, over=("gn", "in", "bn"), num_groups=2), (2, 4, 2, 2),
    ),
    "SwitchableNorm2d-sample": (
        lambda: ours.SwitchableNorm2d(3, over=("bn", "ln"), sample_variance=True), (2, 3, 2, 2),
    ),
    "SwitchableNorm1d-sample": (
        lambda: ours.SwitchableNorm1d(3, sample_variance=True), (4, 3),
    ),
}  # fmt: skip
layers = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def as_function(layer):
    """Return a function of x and the parameters, and the parameters."""
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return from_func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    return call, tuple(layer.parameters())


@layers
def test_gradients(make, shape):
    call, parameters = as_function(filled(make()))
    x = tensor(*shape).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *parameters), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, (x, *parameters))


@layers
def test_the_operator_is_sound(make, shape):
    # Schema, fake implementation, autograd registration and functionalisation of both operators.
    inputs = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "numbanorm":
                inputs[op] = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
            return op(*args, **(kwargs or {}))

    x = tensor(*shape).requires_grad_()
    with Watch():
        filled(make())(x).backward(tensor(*shape, seed=1))
    assert list(inputs) == [NORMALIZE, torch.ops.numbanorm.normalize_backward.default]
    for op, args in inputs.items():
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, args, test_utils=tests)


def test_channels_last_and_strides_of_the_fake():
    x = tensor(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    for layout in (x, x[:, :, ::2], x.transpose(2, 3), x[:1].expand(3, 4, 5, 6)):
        args = (
            layout,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            "gn",
            1e-5,
            2,
            [],
            [],
            1,
            True,
            False,
            "",
            "",
            0.0,
        )
        torch.library.opcheck(NORMALIZE, args, test_utils=("test_faketensor",))


# -- torch.compile ---------------------------------------------------------------------------------


def network():
    nn = torch.nn
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.LayerNorm(6),
        nn.RMSNorm(6), nn.BatchNorm2d(8, momentum=None, affine=False),
    )  # fmt: skip
    return ours.convert(model).append(ours.SwitchableNorm2d(8))


def same_step(model, run, x, training):
    reference = copy.deepcopy(model).train(training)
    model.train(training).zero_grad()
    y, expected = run(x), reference(x)
    assert_close(y.detach(), expected.detach(), scale=10)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    y.backward(dy)
    reference.zero_grad()
    expected.backward(dy)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(p.grad, q.grad, scale=100)
    for p, q in zip(model.buffers(), reference.buffers(), strict=True):
        assert_close(p.double(), q.double(), scale=10, dtype="float32")


def test_compile_without_a_graph_break():
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        same_step(model, compiled, torch.rand(4, 3, 8, 8), training)


def test_compile_with_dynamic_sizes():
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3, 5):
        same_step(model, compiled, torch.rand(n, 3, 8, 8), True)


def test_compile_with_inductor():
    torch._dynamo.reset()
    try:
        torch.compile(torch.nn.Softplus())(torch.rand(3))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"inductor compiles nothing here, not even a layer of PyTorch: {error}")
    model = ours.BatchNorm2d(4)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.rand(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    same_step(model, compiled, x, True)


# -- torch.func ----------------------------------------------------------------------------------

PAIRS = {
    "LayerNorm": lambda m: m.LayerNorm(5),
    "GroupNorm": lambda m: m.GroupNorm(2, 6),
    "RMSNorm": lambda m: m.RMSNorm((5, 5)),
    "InstanceNorm2d": lambda m: m.InstanceNorm2d(6, affine=True),
    "BatchNorm2d-untracked": lambda m: m.BatchNorm2d(6, track_running_stats=False),
    "BatchNorm2d-evaluation": lambda m: m.BatchNorm2d(6).eval(),
}


def transforms(layer):
    """Yield what torch.func makes of a layer; both libraries have to make the same of it."""
    call, parameters = as_function(layer)
    x = tensor(4, 6, 5, 5)
    stack = torch.stack([x, 2 * x + 1])

    def loss(x, *parameters):
        return (call(x, *parameters) ** 3).sum()

    def curve(t):
        return (layer(x * t[0] + x**2 * t[1]) ** 3 * x).sum()

    t = torch.tensor([2.0, 1.0]).double()
    everything = tuple(range(1 + len(parameters)))
    yield from_func.grad(loss, everything)(x, *parameters)
    yield from_func.vmap(layer)(stack)
    yield from_func.vmap(layer, in_dims=1, out_dims=1)(stack.transpose(0, 1))
    in_dims = (0, *[None] * len(parameters))
    yield from_func.vmap(from_func.grad(loss, everything), in_dims)(stack, *parameters)
    all_mapped = tuple(torch.stack([p, p + 1, p - 1]) for p in parameters)
    yield from_func.vmap(call, (None, *[0] * len(parameters)))(x, *all_mapped) if parameters else ()
    y, vjp = from_func.vjp(call, x, *parameters)
    yield from_func.vmap(vjp)(torch.stack([y**2, y + 1, y]))
    yield from_func.vmap(from_func.vmap(vjp))(torch.stack([torch.stack([y**2, y]), stack]))
    yield from_func.jacrev(lambda x: layer(x)[0, 0])(x)
    yield from_func.functionalize(from_func.grad(loss))(x, *parameters)
    yield from_func.jvp(layer, (x,), (x**2,))
    yield from_func.jacrev(curve)(t)
    yield from_func.jacfwd(curve)(t)
    yield from_func.hessian(curve)(t)
    yield from_func.grad(lambda t: (from_func.grad(curve)(t) ** 2).sum())(t)


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_transforms(make):
    layer, reference = filled(make(ours)), filled(make(torch.nn))
    for found, expected in zip(transforms(layer), transforms(reference), strict=True):
        leaves = (torch.utils._pytree.tree_leaves(tree) for tree in (found, expected))
        for a, b in zip(*leaves, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@layers
def test_forward_mode(make, shape):
    call, parameters = as_function(filled(make()))
    x = tensor(*shape).requires_grad_()
    assert torch.autograd.gradcheck(
        call, (x, *parameters), check_forward_ad=True, check_backward_ad=False
    )


@layers
def test_forward_mode_within_forward_mode(make, shape):
    # PyTorch's own is silently wrong here; a difference of first derivatives is not.
    layer = filled(make())
    x, first, second = (tensor(*shape, seed=seed) for seed in range(3))

    def derivative(x):
        return torch.func.jvp(layer, (x,), (first,))[1]

    if layer.training:  # torch.func lets nothing be tracked
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    found = torch.func.jvp(derivative, (x,), (second,))[1]
    step = 1e-5
    expected = (derivative(x + step * second) - derivative(x - step * second)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ours.SwitchableNorm2d(4, track_running_stats=False),
        lambda: ours.SwitchableNorm2d(4).eval(),
        lambda: ours.Norm((0, 2, 3), shape=4),
        lambda: ours.Norm((1, 2), shape=(4, 5), groups=2, feature_axes=(1, 2)),
        lambda: ours.LayerNorm2d(4),
    ],
)
def test_maps_of_layers_that_pytorch_has_not(make):
    layer, x = filled(make()), tensor(3, 2, 4, 5, 6)
    found = from_func.vmap(layer)(x)
    torch.testing.assert_close(found, torch.stack([layer(each) for each in x]))
    _, vjp = from_func.vjp(layer, x[0])
    dys = tensor(3, 2, 4, 5, 6, seed=1)
    expected = torch.stack([vjp(dy)[0] for dy in dys])
    torch.testing.assert_close(from_func.vmap(vjp)(dys)[0], expected)


def test_a_map_of_gradients_is_one_call(monkeypatch):
    seen, backward = [], ops.backward
    monkeypatch.setattr(ops, "backward", lambda dx, *rest: seen.append(dx) or backward(dx, *rest))
    for make in PAIRS.values():
        y, vjp = from_func.vjp(filled(make(ours)), tensor(4, 6, 5, 5))
        from_func.vmap(vjp)(torch.stack([y] * 7))
    assert [dx.shape for dx in seen] == [(7, 4, 6, 5, 5)] * len(PAIRS)


def test_gradient_penalty():
    # As of WGAN-GP: the norm of a gradient, differentiated again.
    results = []
    for make in (ours.InstanceNorm2d, torch.nn.InstanceNorm2d):
        layer = filled(make(3, affine=True))
        x = tensor(2, 3, 4, 4).requires_grad_()
        (dx,) = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)
        dx.norm().backward()
        results.append([x.grad, layer.weight.grad, layer.bias.grad])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, scale=100)


# -- Threads -------------------------------------------------------------------------------------


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", [1, 2])
def test_threads_are_those_of_pytorch(n, torch_threads, monkeypatch):
    seen = []

    def watch(kernel, *args):
        def watched(threads, *args):
            if threads != _launch.SERIAL:
                seen.append(threads[2])
            kernel(threads, *args)

        run(watched, *args)

    run = _threads.run
    for room in (elements, groups, pieces):
        monkeypatch.setattr(room, "run", watch)
    before = numba.get_num_threads(), numbanorm.get_num_threads(), torch.get_num_interop_threads()
    torch.set_num_threads(n)
    x = torch.rand(8, 4, 64, 64, requires_grad=True)
    ours.BatchNorm2d(4)(x).sum().backward()
    after = numba.get_num_threads(), numbanorm.get_num_threads(), torch.get_num_interop_threads()
    assert before == after
    assert torch.get_num_threads() == n
    assert set(seen) == (set() if n == 1 else {n})  # one thread needs no parallel kernel


def test_bits_do_not_depend_on_threads(torch_threads):
    x, dy = torch.rand(8, 16, 48, 48), torch.rand(8, 16, 48, 48)
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        layer, found = ours.SwitchableNorm2d(16), x.clone().requires_grad_()
        y = layer(found)
        y.backward(dy)
        results.append([y, found.grad, layer.mean_weight.grad, layer.running_var])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_more_threads_than_numba_has(torch_threads):
    torch.set_num_threads(numba.config.NUMBA_NUM_THREADS + 3)
    x = torch.rand(8, 4, 64, 64)
    assert ours.BatchNorm2d(4)(x).shape == x.shape


def test_python_threads(restore_threads):
    numbanorm.set_num_threads(1)
    layer, x = ours.LayerNorm(64), torch.rand(4096, 64)
    expected, found = layer(x), []

    def work():
        found.extend(torch.equal(layer(x), expected) for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [True] * 15
    assert numbanorm.get_num_threads() == 1


def test_thread_count_nests():
    with _threads.thread_count(3):
        with pytest.raises(KeyError), _threads.thread_count(1):
            raise KeyError
        assert _threads._per_thread.num_threads == 3
    assert _threads._per_thread.num_threads is None


# -- dx takes the place of dy where nobody else has that -----------------------------------------

IN_PLACE = {
    "BatchNorm2d": (lambda: ours.BatchNorm2d(4), torch.contiguous_format),
    "BatchNorm2d-last": (lambda: ours.BatchNorm2d(4), torch.channels_last),
    "SwitchableNorm2d": (lambda: ours.SwitchableNorm2d(4), torch.contiguous_format),
    "LayerNorm": (lambda: ours.LayerNorm(6), torch.contiguous_format),
}


@pytest.fixture
def in_place(monkeypatch):
    """Note of each backward whether it writes dx over dy."""
    found, backward = [], ops.backward

    def note(dx, dy, *rest):
        found.append(dx is dy)
        return backward(dx, dy, *rest)

    monkeypatch.setattr(ops, "backward", note)
    with use(recycle_tensors_from=0):
        yield found


@pytest.fixture(params=IN_PLACE)
def norm(request):
    """Return a layer, x, dy, and what dx and the gradient of the weight are."""
    make, form = IN_PLACE[request.param]
    layer = filled(make())
    x, dy = (tensor(3, 4, 5, 6, seed=seed).to(memory_format=form) for seed in (0, 1))
    x.requires_grad_()
    expected = torch.autograd.grad(layer(x), (x, layer.weight), dy)
    assert expected[0].stride() == x.stride()
    return layer, x, dy, expected


def check_gradients(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


def test_dx_is_written_over_a_dy_that_nobody_else_has(norm, in_place):
    layer, x, dy, expected = norm
    y = layer(x)
    for _ in range(2):
        found = torch.autograd.grad((y * dy).sum(), (x, layer.weight), retain_graph=True)
        check_gradients(found, expected)
    assert in_place == [True, True]


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")]
)
def test_the_count_of_owners_is_the_same_in_every_mode(mode):
    with mode():
        assert private.sole_owner_counts.__wrapped__() == private.sole_owner_counts()


def keep_by_hook(y, kept):
    y.register_hook(kept.append)


def keep_by_prehook(y, kept):
    y.grad_fn.register_prehook(lambda dys: kept.append(dys[0]))


def keep_by_hook_of_the_node(y, kept):
    y.grad_fn.register_hook(lambda dxs, dys: kept.append(dys[0]))


def keep_a_view(y, kept):
    y.register_hook(lambda dy: kept.append(dy[:]))


def keep_the_memory(y, kept):
    y.register_hook(lambda dy: kept.append(dy.detach()))


def keep_as_an_array(y, kept):
    y.register_hook(lambda dy: kept.append(dy.numpy()))


@pytest.mark.parametrize(
    "keep",
    [
        keep_by_hook, keep_by_prehook, keep_by_hook_of_the_node, keep_a_view, keep_the_memory,
        keep_as_an_array,
    ],
)  # fmt: skip
def test_a_gradient_that_somebody_keeps_stays_as_it_is(norm, keep, in_place):
    layer, x, dy, expected = norm
    y, kept = layer(x), []
    keep(y, kept)
    check_gradients(torch.autograd.grad((y * dy).sum(), (x, layer.weight)), expected)
    (found,) = kept
    assert torch.equal(torch.as_tensor(found), dy)
    assert in_place == [False]


def test_a_gradient_whose_storage_somebody_keeps_stays_as_it_is(norm, in_place):
    layer, x, dy, expected = norm
    y, kept = layer(x), []
    y.register_hook(lambda dy: kept.append(dy.untyped_storage()))
    check_gradients(torch.autograd.grad((y * dy).sum(), (x, layer.weight)), expected)
    found = torch.empty(0, dtype=dy.dtype).set_(kept[0], 0, dy.shape, dy.stride())
    assert torch.equal(found, dy)
    assert in_place == [False]


def test_a_retained_gradient_is_a_copy(norm, in_place):
    layer, x, dy, expected = norm
    y = layer(x)
    y.retain_grad()
    (y * dy).sum().backward()
    check_gradients((x.grad, layer.weight.grad), expected)
    assert torch.equal(y.grad, dy)
    assert in_place == [True]


def test_gradients_of_a_module_s_hook_stay_as_they_are(norm):
    layer, x, dy, expected = norm
    kept = []
    layer.register_full_backward_hook(lambda _, dxs, dys: kept.extend([*dxs, *dys]))
    check_gradients(torch.autograd.grad((layer(x) * dy).sum(), (x, layer.weight)), expected)
    assert torch.equal(kept[0], expected[0]) and torch.equal(kept[1], dy)


def test_a_given_gradient_stays_as_it_is(norm, in_place):
    layer, x, dy, expected = norm
    given = [dy.clone(memory_format=torch.preserve_format)]
    y = layer(x)
    torch.autograd.backward([y], given)
    check_gradients((x.grad, layer.weight.grad), expected)
    assert torch.equal(given[0], dy)
    assert in_place == [False]


def test_two_layers_that_get_the_same_gradient(norm, in_place):
    layer, x, dy, (dx, dweight) = norm
    doubled = torch.autograd.grad(((layer(x) + layer(x)) * dy).sum(), (x, layer.weight))
    assert in_place[0] is False
    assert_close(doubled[0].numpy(), 2 * dx.numpy())
    assert_close(doubled[1].numpy(), 2 * dweight.numpy())


def test_the_input_of_a_residual_gets_its_gradient(norm, in_place):
    layer, x, dy, (dx, _) = norm
    inner = x * 1
    (found,) = torch.autograd.grad(((inner + layer(inner)) * dy).sum(), x)
    assert_close(found.numpy(), (dx + dy).numpy())
    assert in_place == [False]


def test_an_array_of_somebody_else_stays_as_it_is(norm, in_place):
    layer, x, dy, expected = norm
    array = dy.numpy().copy(order="K")

    class FromArray(torch.autograd.Function):
        forward = staticmethod(lambda ctx, y: y + 1)
        backward = staticmethod(lambda ctx, _: torch.from_numpy(array))

    found = torch.autograd.grad(FromArray.apply(layer(x)).sum(), (x, layer.weight))
    check_gradients(found, expected)
    assert (array == dy.numpy()).all()
    assert in_place == [False]


def test_a_gradient_that_is_asked_for_stays_as_it_is(norm, in_place):
    layer, x, dy, expected = norm
    y = layer(x)
    found, *others = torch.autograd.grad((y * dy).sum(), (y, x, layer.weight))
    check_gradients(others, expected)
    assert torch.equal(found, dy)
    assert in_place == [False]


def test_a_gradient_of_another_form_is_not_written_to(norm, in_place):
    layer, x, *_ = norm
    dy = tensor(6, 5, 4, 3).permute(3, 2, 1, 0)
    expected = torch.autograd.grad(layer(x), x, dy)
    check_gradients(torch.autograd.grad((layer(x) * dy).sum(), x), expected)
    torch.autograd.grad(layer(x).sum(), x)
    assert in_place == [False] * 3
