"""Batch norm and neuron in one: against torch's batch norm and the neuron after it, and against float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from bn_neuron_checks import T, close, norm_for, random_input, run
from torch import nn

import snnfast
from snnfast import backends, layer, surrogate
from snnfast.fused import BatchNormNode
from snnfast.fused import ops as fused_ops
from snnfast.fused.batch_norm import misfit

pytestmark = pytest.mark.skipif(
    backends.native.missing(torch.device("cpu")) is not None, reason="the compiled extension is not built here"
)
NEURONS = (snnfast.IFNode, snnfast.LIFNode, snnfast.ParametricLIFNode)
SHAPES = [(T * 6, 5, 8, 8), (T * 3, 7, 5, 3), (T * 3, 16, 5, 5), (T * 2, 17, 9, 11), (T * 9, 33), (T * 5, 3, 41)]
SHAPES += [(T * 2, 4, 2, 3, 5)]
LAYOUTS = [(s, torch.contiguous_format) for s in SHAPES] + [(s, torch.channels_last) for s in SHAPES[:4]]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "memory_format"), LAYOUTS, ids=str)
def test_equals_torchs_norm_and_the_neuron(shape, memory_format, dtype, training, count_fused):
    x = random_input(*shape, dtype=dtype, memory_format=memory_format)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    for kind, affine, v_reset in itertools.product(NEURONS, (True, False), (0.0, None)):
        norm, neuron = norm_for(x, affine), kind(timesteps=T, v_reset=v_reset, detach_reset=affine)
        apart = nn.Sequential(copy.deepcopy(norm), copy.deepcopy(neuron)).train(training)
        node = BatchNormNode(norm, neuron).train(training)
        s, grad_x, grads = run(node, x, v_weight=0.3)
        exact = copy.deepcopy(apart).double()
        want_s, want_grad_x, want_grads = run(apart, x, v_weight=0.3)
        # Seeds and shapes are fixed and small: no charge lies within rounding of the threshold.
        assert torch.equal(s, want_s)
        assert 0.002 < s.mean() < 0.98
        assert s.stride() == want_s.stride()
        assert grad_x.stride() == want_grad_x.stride()
        assert torch.allclose(neuron.v, apart[1].v, rtol=0, atol=tolerance)
        # Torch sums in float32 and loses more than we do; the float64 modules are the truth.
        _, exact_grad_x, exact_grads = run(exact, x.double(), v_weight=0.3)
        assert close(grad_x, want_grad_x, 10 * tolerance)
        assert close(grad_x, exact_grad_x, 1e-5)
        for g, w, exact_g in zip(grads, want_grads, exact_grads, strict=True):
            assert close(g, w, 10 * tolerance)
            assert close(g, exact_g, 1e-5)
        for b, w in zip(norm.buffers(), apart[0].buffers(), strict=True):
            assert torch.allclose(b, w, rtol=tolerance, atol=1e-7)
    assert len(count_fused) == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_half_input_is_normalised_in_float32_and_not_rounded_before_the_charge(dtype, memory_format):
    x = random_input(T * 8, 20, 9, 9, dtype=dtype, memory_format=memory_format)
    for kind in NEURONS:
        node = BatchNormNode(norm_for(x), kind(timesteps=T))
        want = copy.deepcopy(node)
        s, grad_x, grads = run(node, x)
        want_s, want_grad_x, want_grads = run(want, x.float())
        assert s.dtype == grad_x.dtype == dtype
        assert torch.equal(s.float(), want_s)
        assert close(grad_x, want_grad_x, 2 * torch.finfo(dtype).eps)
        # The gradient is computed from spikes' gradients rounded to the dtype.
        assert all(close(g, w, 5e-3) for g, w in zip(grads, want_grads, strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("steps", [1, 3, 8, 9])
def test_whole_vectors_of_few_steps(steps, size, memory_format):
    """The backward has loops of their own for these: against float64, which has not, with states in between."""

    def gradients(node, xs, skip):
        node.neuron.reset()
        xs = [x.detach().clone().requires_grad_() for x in (*xs, skip)]
        arguments = xs[2:] if node.connect else []
        out = [node(x, *arguments) for x in xs[:2]]  # the second call starts from the first one's states
        weights = torch.linspace(-1, 1, out[0].numel()).bfloat16().to(out[0].dtype).view(out[0].shape)
        sum((s * weights).sum() + node.neuron.v.sum() / 4 for s in out).backward()
        return out, [t.grad for t in (*xs, *node.parameters()) if t.grad is not None]

    kinds = itertools.product(NEURONS, ("hard", "soft", "detached"), (None, "CHARGE"), (True, False))
    differing = 0
    for kind, reset, connect, training in kinds:
        for dtype in (torch.float32, torch.bfloat16):
            xs = [random_input(steps * 5, 16, size, size, dtype=dtype, memory_format=memory_format) for _ in range(2)]
            skip = (torch.randn_like(xs[0]) / 4).contiguous(memory_format=memory_format)
            v_reset = None if reset == "soft" else 0.1
            neuron = kind(timesteps=steps, v_reset=v_reset, detach_reset=reset == "detached", v_threshold=0.8)
            node = BatchNormNode(norm_for(xs[0]), neuron, connect=connect).train(training)
            exact = copy.deepcopy(node).double()
            want, want_grads = gradients(exact, [x.double() for x in xs], skip.double())
            got, grads = gradients(node, xs, skip)
            if not all(torch.equal(a.double(), b) for a, b in zip(got, want, strict=True)):
                differing += 1  # a charge within rounding of the threshold
                continue
            assert 0.002 < got[1].float().mean() < 0.98
            tolerance = 5e-5 if dtype == torch.float32 else 4e-3  # gradients in bfloat16 are rounded twice
            assert len(grads) == len(want_grads) == 2 + bool(connect) + len(list(node.parameters()))
            for g, w in zip(grads, want_grads, strict=True):
                assert close(g, w, tolerance)
    assert differing <= 7  # of 72


def first_step_near_the_threshold(norm, neuron, x, tolerance):
    """The spikes in float64, and where they are certain: before a neuron's first charge that lies within ``tolerance``
    of the threshold."""
    norm, neuron = copy.deepcopy(norm).double(), copy.deepcopy(neuron)
    y = norm(x.double()).unflatten(0, (T, -1))
    neuron.v = torch.zeros_like(y[0])
    spikes, certain, ok = [], [], torch.ones_like(y[0], dtype=torch.bool)
    for y_t in y:
        neuron.neuronal_charge(y_t)
        ok = ok & ((neuron.v - neuron.v_threshold).abs() > tolerance)
        s = (neuron.v >= neuron.v_threshold).double()
        neuron.neuronal_reset(s)
        spikes.append(s)
        certain.append(ok)
    return torch.cat(spikes), torch.cat(certain)


@pytest.mark.parametrize("kind", NEURONS)
@pytest.mark.parametrize(("mean", "tolerance"), [(0.0, 1e-5), (100.0, 1e-4)])
def test_spikes_against_float64(kind, mean, tolerance):
    x = torch.randn(T * 16, 8, 16, 16) + mean
    norm, neuron = norm_for(x), kind(timesteps=T, v_threshold=0.6)
    with torch.no_grad():
        want, certain = first_step_near_the_threshold(norm, neuron, x, tolerance)
        s = BatchNormNode(norm, neuron)(x)
    assert torch.equal(s[certain].double(), want[certain])
    assert certain.float().mean() > 0.99
    assert 0.01 < s.mean() < 0.9


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    found = {}
    for shape, memory_format in [
        ((T * 8, 24, 17, 17), torch.contiguous_format),
        ((T * 8, 24, 17, 17), torch.channels_last),
    ]:
        x = random_input(*shape, memory_format=memory_format)
        node = BatchNormNode(norm_for(x), snnfast.ParametricLIFNode(timesteps=T))
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            try:
                again = copy.deepcopy(node)
                found[threads] = [*itertools.chain(*(r if isinstance(r, list) else [r] for r in run(again, x)))]
                found[threads] += list(again.buffers())
            finally:
                torch.set_num_threads(before)
        for threads in (2, 3, 7):
            assert all(torch.equal(a, b) for a, b in zip(found[threads], found[1], strict=True))


def test_every_instruction_set(monkeypatch):
    _C = backends.native._C
    before, stream = _C.cpu_set(), _C.stream_stores_from()
    results = []
    try:
        for name, from_bytes in itertools.product(_C.cpu_sets(), (0, 2**60)):
            _C.set_cpu_set(name)
            _C.set_stream_stores_from(from_bytes)
            backends.native._config.cache_clear()
            torch.manual_seed(1)
            results.append([])
            shapes = ((T * 4, 6, 9, 9), (T * 4, 16, 8, 8), (T * 9, 37))
            for dtype, shape in itertools.product((torch.float32, torch.bfloat16), shapes):
                x = random_input(*shape, dtype=dtype)
                results[-1].append(run(BatchNormNode(norm_for(x), snnfast.LIFNode(3.0, timesteps=T)), x))
    finally:
        _C.set_cpu_set(before)
        _C.set_stream_stores_from(stream)
        backends.native._config.cache_clear()
    for result in results[1:]:
        for (s, grad_x, grads), (want_s, want_grad_x, want_grads) in zip(result, results[0], strict=True):
            assert torch.equal(s, want_s)
            assert close(grad_x, want_grad_x, 1e-5 if s.dtype == torch.float32 else 4e-3)
            assert all(close(g, w, 1e-5) for g, w in zip(grads, want_grads, strict=True))


def test_layers_with_time_and_single_steps(count_fused):
    x = random_input(T, 3, 6, 5, 5)
    pairs = [
        (layer.BatchNorm2d(6, step_mode="m"), {"step_mode": "m"}, x),
        (layer.ThresholdDependentBatchNorm2d(1.0, 1.0, 6), {"step_mode": "m"}, x),
        (layer.BatchNorm1d(6, step_mode="m"), {"step_mode": "m"}, x[..., 0, 0]),
        (nn.BatchNorm2d(6), {"step_mode": "s"}, x[0]),
    ]
    for count, (norm, arguments, x) in enumerate(pairs, 1):
        node = BatchNormNode(norm, snnfast.LIFNode(**arguments))
        apart = nn.Sequential(copy.deepcopy(norm), snnfast.LIFNode(**arguments))
        for _ in range(2):  # the state goes on
            for got, want in zip(run(node, x)[:2], run(apart, x)[:2], strict=True):
                assert close(got, want, 1e-5)
            snnfast.functional.detach_net(node), snnfast.functional.detach_net(apart)
        assert len(count_fused) == 2 * count
        assert torch.allclose(node.neuron.v, apart[1].v, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck(training):
    # Far from the threshold, where the surrogate's derivative is nothing and the true gradient is the one computed.
    constants = snnfast.LIFNode(tau=3.0, v_threshold=1e3, v_reset=0.1)._constants(0.0)
    for shape, per_step in [((3, 2, 3, 2, 2), False), ((2, 1, 2, 6, 6), training), ((3, 4, 2), False)]:
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        weight, bias = (torch.randn(shape[2], dtype=torch.float64, requires_grad=True) for _ in range(2))
        v0 = torch.randn(shape[1:], dtype=torch.float64, requires_grad=True)
        statistics = (None, None) if training else (torch.zeros(shape[2]).double(), torch.ones(shape[2]).double())

        def potential(x, weight, bias, v0, statistics=statistics, per_step=per_step):
            return fused_ops.batch_norm_multi_step(
                x, *statistics, weight, bias, v0, None, eps=1e-3, per_step=per_step, constants=constants
            )[1]

        assert torch.autograd.gradcheck(potential, (x, weight, bias, v0))
        assert torch.autograd.gradgradcheck(potential, (x, weight, bias, v0))


def test_second_derivative_is_the_unfused_ones():
    x = random_input(T * 3, 4, 6, 6, dtype=torch.float64).requires_grad_()
    node = BatchNormNode(norm_for(x), snnfast.ParametricLIFNode(timesteps=T, surrogate_function=surrogate.ATan()))
    apart = nn.Sequential(copy.deepcopy(node.norm), copy.deepcopy(node.neuron))
    found = []
    for model in (node, apart):
        inputs = (x, *model.parameters())
        grads = torch.autograd.grad((model(x) * torch.sin(x)).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum((g**2).sum() for g in grads), inputs))
    assert all(close(g, w, 1e-9) for g, w in zip(*found, strict=True))


def test_keeps_the_convolutions_output_and_nothing_as_large():
    x = random_input(T * 4, 16, 16, 16).requires_grad_()
    sizes = []
    node = BatchNormNode(norm_for(x), snnfast.LIFNode(timesteps=T))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.numel(), t.data_ptr())) or t, lambda t: t):
        node(x)
    large = {pointer for size, pointer in sizes if size > 1000}
    assert large == {x.data_ptr()}


@pytest.mark.filterwarnings("ignore:surrogate")
def test_what_the_kernels_do_not_serve_runs_as_two_modules(count_fused):
    x = random_input(T * 2, 4, 5, 5)
    custom = surrogate.ATan(spiking=False)
    for neuron in (
        snnfast.LIFNode(timesteps=T, store_v_seq=True),
        snnfast.LIFNode(timesteps=T, backend="reference"),
        snnfast.LIFNode(timesteps=T, surrogate_function=custom),
    ):
        node = BatchNormNode(norm_for(x), neuron)
        apart = nn.Sequential(copy.deepcopy(node.norm), copy.deepcopy(neuron))
        assert misfit(node.norm, neuron)
        assert torch.equal(node(x), apart(x))
        assert neuron.v_seq is None or torch.equal(neuron.v_seq, apart[1].v_seq)
    hooked = BatchNormNode(norm_for(x), snnfast.LIFNode(timesteps=T))
    seen = []
    hooked.norm.register_forward_hook(lambda *args: seen.append(args[2]))
    hooked(x)
    assert len(seen) == 1
    assert not count_fused
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNormNode(nn.BatchNorm1d(3), snnfast.LIFNode(timesteps=1))(torch.randn(1, 3))
    with pytest.raises(ValueError, match="timesteps=4"):
        BatchNormNode(nn.BatchNorm1d(3), snnfast.LIFNode(timesteps=4))(torch.randn(6, 3))
    with pytest.raises(ValueError, match="4D"):
        BatchNormNode(nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=4))(torch.randn(8, 3))
    with pytest.raises(TypeError, match="norm must be a batch norm"):
        BatchNormNode(nn.ReLU(), snnfast.LIFNode())
    with pytest.raises(TypeError, match="neuron must be a snnfast neuron"):
        BatchNormNode(nn.BatchNorm1d(3), nn.ReLU())


def test_autocast(count_fused):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), BatchNormNode(nn.BatchNorm2d(16), snnfast.LIFNode(timesteps=T)))
    apart = copy.deepcopy(net)
    x = torch.randn(T * 4, 3, 12, 12)
    grads = []
    for model, modules in ((net, [net[1]]), (apart, [apart[1].norm, apart[1].neuron])):
        with torch.autocast("cpu", torch.bfloat16):
            y = model[0](x)
            for module in modules:
                y = module(y)
        y.float().square().sum().backward()
        grads.append((y, model[1].norm.weight.grad, model[0].weight.grad))
    (s, *found), (want, *wanted) = grads
    assert s.dtype == want.dtype == torch.bfloat16
    assert len(count_fused) == 1
    # The batch norm apart rounds its output to bfloat16, which turns some spikes.
    assert (s != want).float().mean() < 5e-3
    assert all(close(g, w, 0.1) for g, w in zip(found, wanted, strict=True))


def test_forgotten_reset_is_named():
    x = random_input(T * 2, 4, 5, 5).requires_grad_()
    node = BatchNormNode(norm_for(x), snnfast.LIFNode(timesteps=T))
    node(x).sum().backward()
    with pytest.raises(RuntimeError, match="reset_net"):
        node(x).sum().backward()


def test_inputs_that_are_not_finite():
    x = random_input(T * 2, 4, 8, 8)
    x[3, 1, 2, 2] = float("nan")
    x[3, 2, 2, 2] = float("inf")
    node = BatchNormNode(norm_for(x), snnfast.LIFNode(timesteps=T))
    apart = nn.Sequential(copy.deepcopy(node.norm), copy.deepcopy(node.neuron))
    assert torch.equal(node(x), apart(x))
    assert torch.equal(node.neuron.v.isnan(), apart[1].v.isnan())


def test_the_ops_and_a_compiled_node():
    x = random_input(T * 2, 4, 5, 5)
    node = BatchNormNode(norm_for(x), snnfast.LIFNode(timesteps=T))
    x_seq = x.unflatten(0, (T, -1))
    torch.library.opcheck(
        torch.ops.snnfast.bn_statistics.default, (x_seq, False), test_utils=("test_schema", "test_faketensor")
    )
    mean, var = torch.ops.snnfast.bn_statistics(x_seq, True)
    x_seq = x_seq.clone().requires_grad_()
    call = (x_seq, mean, var, node.norm.weight.detach(), None, None, None, None, 0, 1e-5, *node.neuron._constants(0.0))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.snnfast.bn_multi_step.default, (*call, True))
    grads = (torch.randn_like(x_seq), None)
    torch.library.opcheck(torch.ops.snnfast.bn_multi_step_backward.default, (*grads, *call, True), test_utils=checks)
    compiled = torch.compile(copy.deepcopy(node), backend="aot_eager")
    got, want = run_compiled(compiled, x), run(node, x)
    assert torch.equal(got[0], want[0])
    assert close(got[1], want[1], 1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("connect", [None, "IAND", "per step", "fuse"])
def test_an_exported_program_can_be_trained(connect, training):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.neuron = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3), neuron()
            if connect != "fuse":
                skip = None if connect == "per step" else connect
                self.node = BatchNormNode(nn.BatchNorm2d(3), neuron(), connect=skip, per_step=connect == "per step")

        def forward(self, x):
            y = self.conv(x)
            return self.neuron(self.norm(y)) if connect == "fuse" else self.node(y, *[y * 2] * bool(self.node.connect))

    def neuron():
        return snnfast.ParametricLIFNode(timesteps=T)

    net = Net().train(training)
    if connect == "fuse":
        assert snnfast.fuse(net).fused
    x = random_input(T * 3, 3, 6, 6)
    program = torch.export.export(copy.deepcopy(net), (x,)).module()
    got, want = run_compiled(program, x), run_compiled(net, x)
    assert want[0].std() > 0
    assert torch.equal(got[0], want[0])
    assert close(got[1], want[1], 1e-6)
    found = dict(program.named_parameters()) | dict(program.named_buffers())
    for name, p in net.named_parameters():
        grad = found[name].grad
        assert grad is None if p.grad is None else close(grad, p.grad, 1e-5), name  # the decay's terms cancel
    for name, b in net.named_buffers():
        assert torch.allclose(found[name], b, rtol=1e-6, atol=1e-7), name


def run_compiled(model, x):
    x = x.detach().clone().requires_grad_()
    s = model(x)
    (s * torch.linspace(-1, 1, s.numel()).view(s.shape)).sum().backward()
    return s.detach(), x.grad


def test_create_graph_where_the_state_comes_from_the_same_weights():
    def gradients(fused, create_graph):
        torch.manual_seed(0)
        norm, node = nn.BatchNorm2d(3).double(), snnfast.LIFNode(timesteps=2, tau=2.3)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        net = BatchNormNode(norm, node) if fused else nn.Sequential(norm, node)
        xs = [torch.randn(4, 3, 4, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
        out = sum((net(x) * torch.arange(1.0, 5).view(4, 1, 1, 1)).sum() for x in xs) + node.v.square().sum()
        return torch.autograd.grad(out, [norm.weight, norm.bias, *xs], create_graph=create_graph)

    for got, want in zip(gradients(True, True), gradients(False, False), strict=True):
        assert torch.allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("shape", [(T * 2, 6, 3), (T * 2, 4, 5, 3), (T, 3)], ids=str)
def test_a_transposed_input_comes_out_as_torchs_norms_have_it(shape):
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](shape[1])
    node = BatchNormNode(norm, snnfast.LIFNode(timesteps=T if len(shape) > 2 else 1))
    x = torch.randn(shape).mT.contiguous().mT.requires_grad_()
    want = copy.deepcopy(node.norm)(x)
    got = node(x)
    assert got.stride() == want.stride()
    got.view(-1).sum().backward()
    assert x.grad.isfinite().all()


def test_a_state_that_inference_mode_left():
    node = BatchNormNode(nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=T))
    apart = copy.deepcopy(node)
    x = torch.randn(T * 2, 3, 5, 5)
    with torch.inference_mode():
        node(x), apart.neuron(apart.norm(x))
    got, want = node(x), apart.neuron(apart.norm(x))
    assert torch.equal(got, want)
    got.sum().backward(), want.sum().backward()
    torch.testing.assert_close(node.norm.weight.grad, apart.norm.weight.grad)


def test_a_tensor_whose_values_are_negated_when_read():
    x = torch.randn(T * 4, 3, 5, 5)
    node = BatchNormNode(nn.BatchNorm2d(3), snnfast.LIFNode(timesteps=T))
    assert torch.equal(copy.deepcopy(node)(torch._neg_view(-x)), node(x))


def test_the_ops_without_the_compiled_kernels(monkeypatch):
    monkeypatch.setattr(backends.native, "_C", None)
    monkeypatch.setattr(backends.native, "_why_missing", "the compiled extension is not here", raising=False)
    with pytest.raises(RuntimeError, match="have no kernel for cpu: the compiled extension is not here"):
        torch.ops.snnfast.bn_statistics(torch.randn(T, 2, 3, 4, 4), False)
