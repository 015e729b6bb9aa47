"""How the ops behave inside torch: opcheck, compile, double backward, torch.func, layouts, autocast."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from conftest import flat, kernel_backends, own_parameters
from torch import nn

import snnfast
from snnfast import backends, dynamics, functional, layer, surrogate
from snnfast.dynamics import NEURONS, Inputs
from snnfast.tensors import is_time_major

NATIVE_CPU = backends.native.missing(torch.device("cpu"))
STRICT = (dynamics.BOX_LIF, dynamics.CURRENT_LIF, *NEURONS[dynamics.LEAKY.id :])  # whose kernels compare so always
needs_native = pytest.mark.skipif(NATIVE_CPU is not None, reason=str(NATIVE_CPU))


def constants(neuron, store_v_seq):
    kind = surrogate.Scaled(surrogate.ATan(2.0), 1.5)
    return functional.constants_of(
        neuron, kind, 0.0, tau=3.0, decay_input=False, v_threshold=0.875, v_leak=0.0625, store_v_seq=store_v_seq
    )


def inputs(neuron, device="cpu", dtype=torch.float32, shape=(4, 2, 3), grad=True):
    """All that the neuron can take: a threshold for all, a beta for each neuron, a current_decay for each channel."""
    state = dynamics.state_dtype(dtype)
    kinds = {"threshold": "one", "beta": "each", "current_decay": "channel"}
    own = {name: own_parameters(neuron, shape[1:], dtype, kinds[name])[k] for k, name in enumerate(neuron.own)}
    states = {f"{name}0": torch.randn(shape[1:], dtype=state) for name in neuron.states}
    decay = {"decay": torch.tensor(0.375, dtype=state)} if neuron.learnable else {}
    found = Inputs(torch.randn(shape, dtype=dtype), **states, **decay, **own)
    return Inputs._make(t if t is None else t.to(device).requires_grad_(grad) for t in found)


def run(neuron, given, backend, **kwargs):
    """Spikes, states and potentials of the neuron from its inputs."""
    state = given.v0 if given.i0 is None else (given.v0, given.i0)
    own = tuple(getattr(given, name) for name in neuron.own)
    kwargs = {"tau": 3.0, "v_threshold": 0.875, "v_leak": 0.0625, "strict": neuron in STRICT} | kwargs
    return flat(
        *functional.multi_step(neuron, given.x, state, given.decay, own, store_v_seq=True, backend=backend, **kwargs)
    )


def names_of(given):
    return [name for name, t in zip(Inputs._fields, given, strict=True) if t is not None]


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
@pytest.mark.parametrize("store_v_seq", [False, True])
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_opcheck(backend, device, neuron, store_v_seq):
    index = backends.NAMES.index(backend) - 1
    given = inputs(neuron, device, grad=False)
    numbers = (*constants(neuron, store_v_seq), index)
    forward, backward = torch.ops.snnfast.multi_step.default, torch.ops.snnfast.multi_step_backward.default
    torch.library.opcheck(forward, (*given, *numbers))
    torch.library.opcheck(forward, (*given._replace(v0=None, i0=None), *numbers))
    last = inputs(neuron, device, shape=(4, 2, 3, 5, 5), grad=False)
    last = last._replace(x=torch.randn(4, 2, 5, 5, 3, device=device).permute(0, 1, 4, 2, 3))
    torch.library.opcheck(forward, (*last, *numbers))
    for inp in (given, last):
        v_seq = torch.randn_like(inp.x) if store_v_seq else None
        grads = torch.randn_like(inp.x), torch.randn_like(inp.v0), torch.randn_like(inp.v0), v_seq
        if inp.i0 is None:
            grads = (*grads[:2], None, v_seq)
        torch.library.opcheck(backward, (*grads, *inp, *numbers, True))
        torch.library.opcheck(backward, (None, grads[1], None, None, *inp._replace(v0=None), *numbers, False))


class Net(nn.Module):
    """A network with state, folded and unfolded layouts, and a learnable neuron."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.first = snnfast.LIFNode(tau=3.0, timesteps=4)
        self.head = nn.Linear(4 * 25, 3)
        self.last = snnfast.ParametricLIFNode(step_mode="m", store_v_seq=True, v_reset=None)

    def forward(self, x):
        y = self.first(self.conv(x)).flatten(1)
        s = self.last(self.head(y).unflatten(0, (4, -1)))
        return s.mean(0) + self.last.v_seq.mean(0)


@needs_native
def test_compile_fullgraph_equals_eager():
    torch._dynamo.reset()
    net, x = Net(), torch.randn(8, 1, 5, 5)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(3):  # the first call has number states, the later ones tensor states
        functional.reset_net(net)
        net.zero_grad()
        want = [net(x), net(x)]
        sum(o.square().sum() for o in want).backward()
        want_grads = [p.grad.clone() for p in net.parameters()]
        functional.reset_net(net)
        net.zero_grad()
        got = [compiled(x), compiled(x)]
        sum(o.square().sum() for o in got).backward()
        for g, w in zip(got, want, strict=True):
            assert torch.allclose(g, w)
        for p, w in zip(net.parameters(), want_grads, strict=True):
            assert torch.allclose(p.grad, w, rtol=1e-4, atol=1e-6)


@needs_native
def test_compile_with_everything_dynamic():
    """Numbers of modules are symbols then, which several neurons and norms share."""
    torch._dynamo.reset()
    node = {"timesteps": 4, "surrogate_function": surrogate.ATan()}
    net = nn.Sequential(
        nn.Linear(3, 5), snnfast.LIFNode(**node), nn.Linear(5, 5), nn.BatchNorm1d(5, eps=1e-3), snnfast.LIFNode(**node),
        nn.Linear(5, 5), nn.BatchNorm1d(5, eps=1e-3), snnfast.IFNode(**node),
    ).double()  # fmt: skip
    plain = copy.deepcopy(net)
    assert len(snnfast.fuse(net).fused) == 2
    compiled = torch.compile(net, dynamic=True, backend="aot_eager")
    for B in (3, 2, 5):
        x = torch.randn(4 * B, 3, dtype=torch.float64)
        results = []
        for model, call in ((plain, plain), (net, compiled)):
            functional.reset_net(model)
            model.zero_grad()
            y = call(x)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(results[1], results[0])


@needs_native
def test_compile_with_inductor():
    torch._dynamo.reset()
    node, x = (
        snnfast.LIFNode(step_mode="m", surrogate_function=surrogate.ATan()),
        torch.randn(4, 37, requires_grad=True),
    )

    def step(x):
        functional.reset_net(node)
        return (node(x * 2) * 3).sum() + node.v.sum()

    (want,) = torch.autograd.grad(step(x), x)
    (got,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(x), x)
    assert torch.allclose(got, want, rtol=1e-5)


@needs_native
@pytest.mark.parametrize("neuron", [dynamics.EXPONENTIAL_LIF, dynamics.SYNAPTIC], ids=lambda n: n.name)
def test_compile_with_own_parameters_and_two_states(neuron):
    torch._dynamo.reset()
    given = inputs(neuron)

    def step(*tensors):
        by_name = dict(zip(names_of(given), tensors, strict=True))
        return sum(o.sin().sum() for o in run(neuron, Inputs(**by_name), "native"))

    tensors = flat(*given)
    want = torch.autograd.grad(step(*tensors), tensors)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for g, w in zip(torch.autograd.grad(compiled(*tensors), tensors), want, strict=True):
        assert torch.allclose(g, w, rtol=1e-5, atol=1e-6)


def loss_of(neuron, names, backend, **kwargs):
    """From the tensors named to a scalar to which every output contributes, for double backward and torch.func."""

    def function(*tensors):
        s, *rest = run(neuron, Inputs(**dict(zip(names, tensors, strict=True))), backend, **kwargs)
        loss = (s * (1 + torch.arange(s.numel(), device=s.device).view_as(s))).sum()
        return loss + sum(o.square().sum() + o.sin().sum() for o in rest)

    return function


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
@pytest.mark.parametrize("v_reset", [None, 0.125], ids=["soft", "hard"])
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_double_backward_equals_the_loops(backend, device, neuron, v_reset):
    given = inputs(neuron, device, torch.float64)
    tensors = flat(*given)

    def penalty(backend):
        loss = loss_of(neuron, names_of(given), backend, v_reset=v_reset, surrogate_function=surrogate.Sigmoid())
        first = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    for name, g, w in zip(names_of(given), penalty(backend), penalty("reference"), strict=True):
        assert torch.allclose(g, w, rtol=1e-8, atol=1e-10), name
        assert w.any(), name


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
def test_double_backward_by_some_inputs_only(backend, device):
    neuron = dynamics.SYNAPTIC
    fixed = inputs(neuron, device, torch.float64, grad=False)
    for wanted in (["x"], ["i0"], ["beta"], ["x", "threshold"]):
        given = fixed._replace(**{name: getattr(fixed, name).clone().requires_grad_() for name in wanted})
        leaves = [getattr(given, name) for name in wanted]
        found = []
        for each in (backend, "reference"):
            loss = loss_of(neuron, names_of(given), each)(*flat(*given))
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
        for g, w in zip(*found, strict=True):
            assert torch.allclose(g, w, rtol=1e-8, atol=1e-10), wanted


def test_what_a_transform_left_behind():
    """Tensors that torch.func wrapped outlive it, in a neuron's state say; PyTorch's own operations take them."""
    left: list[torch.Tensor] = []
    node = snnfast.LIFNode(step_mode="m")
    x = torch.randn(4, 8)

    def f(x):
        left.append(x * 1)
        return node(x).sum()

    torch.func.grad(f)(x)
    after_transform = node.v
    assert all(map(torch._C._functorch.is_dead_tensor_wrapper, (left[0], after_transform)))
    twice = functional.lif_multi_step(torch.cat((x, x)), surrogate_function=surrogate.Sigmoid())[0]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            node.v = after_transform
            assert torch.equal(node(x.clone().requires_grad_()), twice[4:])
            assert torch.equal(functional.lif_multi_step(left[0])[0], twice[:4])


def test_a_state_that_vmap_left_names_the_remedy():
    node = snnfast.LIFNode(step_mode="m")
    x = torch.randn(3, 4, 8)
    torch.func.vmap(node)(x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"vmap left.*reset_net"):
            node(x[0])
    functional.reset_net(node)
    assert torch.equal(node(x[0]), snnfast.LIFNode(step_mode="m")(x[0]))


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: n.name)
def test_torch_func(backend, device, neuron):
    given = inputs(neuron, device, torch.float64, grad=False)
    names, tensors = names_of(given), flat(*given)
    fast, slow = (loss_of(neuron, names, b, surrogate_function=surrogate.ATan()) for b in (backend, "reference"))
    every = tuple(range(len(tensors)))
    for g, w in zip(torch.func.grad(fast, every)(*tensors), torch.func.grad(slow, every)(*tensors), strict=True):
        assert torch.allclose(g, w)

    batched = [torch.stack([t, t * 0.7, t + 0.1]) for t in tensors]
    last = len(tensors) - 1
    for in_dims in [(0,) * (last + 1), (0,) + (None,) * last, (None,) * last + (0,), (None, 0) + (None,) * (last - 1)]:
        args = [b if d == 0 else t for b, t, d in zip(batched, tensors, in_dims, strict=True)]
        assert torch.allclose(torch.func.vmap(fast, in_dims)(*args), torch.func.vmap(slow, in_dims)(*args)), in_dims
        per_sample = [torch.func.vmap(torch.func.grad(f, every), in_dims)(*args) for f in (fast, slow)]
        for name, g, w in zip(names, *per_sample, strict=True):
            assert torch.allclose(g, w), (in_dims, name)
    hessians = [torch.func.jacrev(torch.func.grad(f, last))(*tensors) for f in (fast, slow)]
    assert torch.allclose(*hessians)


@pytest.mark.parametrize(("backend", "device"), kernel_backends())
def test_layouts_go_through_and_come_back(backend, device):
    base = torch.randn(4, 2, 6, 5, 3, device=device)
    cases = {
        "contiguous": base,
        "channels_last": base.permute(0, 1, 4, 2, 3),
        "time inside": base.permute(1, 0, 2, 3, 4),
        "slice": base[:, :, 1:4],
        "step": base[:, :, ::2],
        "expanded time": base[:1].expand(4, 2, 6, 5, 3),
        "expanded batch": base[:, :1].expand(4, 2, 6, 5, 3),
        "size one": base[:, :, :1].permute(0, 2, 1, 3, 4),
        "offset": base.flatten()[1:361].view(4, 90),
    }
    for name, x in cases.items():
        want_x, got_x = x.detach().clone().requires_grad_(), x.detach().requires_grad_()
        v = torch.randn(x.shape[1:], device=device)
        strided_v = torch.empty(*x.shape[1:], 2, device=device)[..., 0].copy_(v).requires_grad_()
        plain_v = v.clone().requires_grad_()
        want = functional.lif_multi_step(want_x, plain_v, 3.0, store_v_seq=True, backend="reference")
        got = functional.lif_multi_step(got_x, strided_v, 3.0, store_v_seq=True, backend=backend)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w), name
        if is_time_major(x):
            assert got[0].stride() == x.stride(), name
        weight = torch.randn_like(base).flatten()[: x.numel()].view(*x.shape[::-1]).permute(*range(x.dim())[::-1])
        losses = [(o[0] * weight).sum() + o[0].sum() + o[2].mean() + (o[1] * v).sum() for o in (want, got)]
        want_grads = torch.autograd.grad(losses[0], [want_x, plain_v])
        got_grads = torch.autograd.grad(losses[1], [got_x, strided_v])
        for g, w in zip(got_grads, want_grads, strict=True):
            assert torch.allclose(g, w, rtol=1e-5, atol=1e-6), name
    folded = base.permute(0, 1, 4, 2, 3).reshape(8, 3, 6, 5).to(memory_format=torch.channels_last)
    out = snnfast.IFNode(timesteps=4, backend=backend)(folded)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, snnfast.IFNode(timesteps=4, backend="reference")(folded))


@needs_native
def test_only_the_input_is_saved():
    x = torch.randn(4, 1000, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functional.lif_multi_step(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_fused_with_a_float32_state(dtype):
    net = nn.Sequential(nn.Linear(8, 6), snnfast.LIFNode(step_mode="m", backend="native"))
    with torch.autocast("cpu", dtype=dtype):
        s = net(torch.randn(4, 3, 8))
    assert s.dtype == dtype
    assert net[1].v.dtype == torch.float32
    s.float().sum().backward()
    assert net[0].weight.grad.abs().sum() > 0


@needs_native
def test_inputs_are_never_written():
    x, v = torch.randn(4, 9), torch.randn(9)
    before = x.clone(), v.clone()
    node = snnfast.LIFNode(step_mode="m")
    node.v = v
    node(x)
    assert torch.equal(x, before[0])
    assert torch.equal(v, before[1])


def test_modifying_the_input_in_place_is_an_error():
    x = torch.randn(4, 3, requires_grad=True)
    y = x * 1
    s, _, _ = functional.if_multi_step(y)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        s.sum().backward()


def test_empty_and_meta():
    x = torch.empty(4, 0, 3, requires_grad=True)
    s, v, v_seq = functional.lif_multi_step(x, store_v_seq=True)
    assert s.shape == v_seq.shape == (4, 0, 3)
    assert v.shape == (0, 3)
    s.sum().backward()
    assert x.grad.shape == x.shape
    s, v, _ = functional.lif_multi_step(torch.empty(4, 5, 3, device="meta", dtype=torch.bfloat16))
    assert (s.shape, s.dtype, v.dtype, s.device.type) == ((4, 5, 3), torch.bfloat16, torch.float32, "meta")
    node = snnfast.IFNode(step_mode="m").to("meta")
    assert node(torch.empty(2, 7, device="meta")).shape == (2, 7)


@needs_native
def test_export_keeps_the_op():
    class Function(nn.Module):
        def forward(self, x):
            return functional.lif_multi_step(x, 0.0, 3.0)[0]

    program = torch.export.export(Function(), (torch.randn(4, 3),))
    assert any("snnfast" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(4, 3) * 2
    assert torch.equal(program.module()(x), functional.lif_multi_step(x, 0.0, 3.0)[0])


@needs_native
@pytest.mark.parametrize("how", ["export", "strict export", "jit.trace"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:The tensor attribute", "ignore:.*torch.jit")
def test_a_program_that_was_recorded_can_be_trained(how):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), snnfast.LIFNode(step_mode="m"), snnfast.ParametricLIFNode(step_mode="m"))
    x = torch.randn(5, 4, 3) * 3
    net(x).sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    assert all(g.abs().sum() > 0 for g in expected)
    functional.reset_net(net)
    net.zero_grad()
    if how == "jit.trace":
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(net, (x,), check_trace=False), file)
        file.seek(0)
        program = torch.jit.load(file)
    else:
        program = torch.export.export(net, (x,), strict=how != "export").module()
    program(x).sum().backward()
    found = dict(program.named_parameters())
    for (name, _), grad in zip(net.named_parameters(), expected, strict=True):
        assert torch.equal(found[name].grad, grad), name


@pytest.mark.parametrize("kind", [snnfast.IFNode, snnfast.LIFNode, snnfast.ParametricLIFNode])
@pytest.mark.filterwarnings("ignore")
def test_onnx_has_the_same_spikes_by_the_reference_path(kind, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="ONNX export needs it, and it is not installed here")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed here")
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU())
    net = snnfast.to_spiking(ann, 5, kind, v_threshold=0.3).eval().double()  # rounding does not reach a spike
    assert snnfast.fuse(net).fused
    x = torch.randn(3, 6, dtype=torch.float64) * 3
    functional.set_backend(net, "reference")
    batch = torch.export.Dim("batch")
    file = tmp_path / "net.onnx"
    torch.onnx.export(net, (x,), file, dynamo=True, verbose=False, dynamic_shapes=({0: batch},))
    session = onnxruntime.InferenceSession(file)
    functional.set_backend(net, "auto")
    for images in (x, torch.randn(7, 6, dtype=torch.float64) * 3):
        (spikes,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        expected = net(images)
        assert 0.02 < expected.mean() < 0.98
        assert torch.equal(torch.from_numpy(spikes), expected)


def test_fx_and_scripting_say_what_would_do():
    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, snnfast.base.StepModule) or super().is_leaf_module(m, name)

    net = nn.Sequential(layer.Linear(3, 8, step_mode="m"), snnfast.LIFNode(step_mode="m"))
    with pytest.raises(TypeError, match=r"got Proxy of torch.fx.*True for snnfast.base.StepModule"):
        torch.fx.symbolic_trace(net[1:])
    traced = torch.fx.GraphModule(net, Leaves().trace(net))
    x = torch.randn(5, 4, 3) * 3
    spikes = net(x)
    functional.reset_net(traced)
    assert torch.equal(traced(x), spikes)
    with pytest.raises(TypeError, match=r"torch.jit.script cannot compile LIFNode: .*torch.export.export"):
        torch.jit.script(net)


@needs_native
def test_a_dispatch_mode_sees_the_op():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        functional.if_multi_step(torch.randn(4, 3))
    assert "snnfast.multi_step.default" in seen


def test_export_keeps_the_fused_op_where_neurons_share_a_surrogate():
    shared = surrogate.ATan()

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = snnfast.LIFNode(step_mode="m", surrogate_function=shared)
            self.second = snnfast.LIFNode(step_mode="m", surrogate_function=shared)

        def forward(self, x):
            snnfast.functional.reset_net(self)
            return self.second(self.first(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the state, which export sees assigned
        program = torch.export.export(Net(), (torch.randn(4, 2, 4),))
    assert [str(n.target) for n in program.graph.nodes].count("snnfast.multi_step.default") == 2


FORWARD_MODE = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    "dual numbers": lambda f, x: _through_dual(f, x),
    "dual numbers with gradient": lambda f, x: _through_dual(f, x.requires_grad_()),
}


def _through_dual(f, x):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("mode", FORWARD_MODE)
def test_forward_mode_is_refused_with_what_does_instead(mode, backend):
    def spikes(x):
        return functional.lif_multi_step(x, backend=backend)[0]

    x = 2 * torch.rand(4, 3)
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .*autograd.functional.jvp\(f, x, v"):
        FORWARD_MODE[mode](spikes, x)
    x, v = x.detach(), torch.rand(4, 3)
    jacobian = torch.func.jacrev(spikes)(x)
    _, product = torch.autograd.functional.jvp(spikes, x, v)
    torch.testing.assert_close(product, torch.einsum("tbuc,uc->tb", jacobian, v))
    torch.func.jacrev(torch.func.jacrev(lambda x: spikes(x).sum()))(x)


def test_forward_mode_past_a_neuron_works():
    s = functional.if_multi_step(torch.rand(4, 3))[0]

    def loss(w):
        return (functional.if_multi_step(torch.ones(4, 3))[0] * w).sum() + s.sum()

    value, product = torch.func.jvp(loss, (torch.ones(3),), (torch.ones(3),))
    assert product == value - s.sum() == 12


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["converted", "folded", "fused"])
def test_jit_trace_sees_the_kernels(kind, tmp_path):
    """A trace that saw past the dispatcher would keep fresh memory in place of spikes."""
    torch.manual_seed(0)
    ann = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    if kind == "converted":
        net = snnfast.to_spiking(ann, 2)
    else:
        net = torch.nn.Sequential(*ann[:2], snnfast.LIFNode(timesteps=2))
        if kind == "fused":
            snnfast.fuse(net)
    net.eval().requires_grad_(False)
    first, second = 5 * torch.rand(4, 2, 6, 6), 5 * torch.rand(4, 2, 6, 6)
    traced = torch.jit.trace(net, (first,), check_trace=False)  # which would find the state of the first call
    traced.save(str(tmp_path / "net.pt"))
    functional.reset_net(net)
    expected = net(second)
    assert 0 < expected.mean() < 1
    assert torch.equal(traced(second), expected)
    assert torch.equal(torch.jit.load(str(tmp_path / "net.pt"))(second), expected)
