"""Step-mode layers: each against SpikingJelly's over random configurations."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import snnfast
from snnfast import functional, layer, network

sj_layer = pytest.importorskip("spikingjelly.activation_based.layer", reason="spikingjelly is not installed")

WRAPPERS = [
    name
    for name in layer.__all__
    if name != "StepLayer" and not name.startswith(("Temporal", "Threshold")) and "Recurrent" not in name
]
small, size = st.integers(1, 3), st.integers(5, 9)


def spatial(name: str) -> int:
    return int(name[-2]) if name[-1] == "d" else 0


@st.composite
def configured(draw):
    """A layer's name, its constructor's arguments, and the shape of one step's input."""
    name = draw(st.sampled_from([n for n in WRAPPERS if "Container" not in n and n not in ("Dropout", "Dropout2d")]))
    B, C, n = draw(small), draw(small) * 2, spatial(name)
    shape = [B, C, *(draw(size) for _ in range(n))]
    kernel, stride, padding = draw(st.integers(2, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 1))
    args: tuple = ()
    kwargs: dict = {}
    if name.startswith("ConvTranspose"):
        args = (C, draw(small) * 2, kernel, stride, padding)
        kwargs = {
            "output_padding": draw(st.integers(0, stride - 1)),
            "groups": draw(st.sampled_from((1, 2))),
            "bias": draw(st.booleans()),
        }
    elif name.startswith("Conv"):
        args = (C, draw(small) * 2, kernel)
        kwargs = {
            "stride": stride,
            "padding": draw(st.sampled_from((0, 1, "valid"))),
            "dilation": draw(st.integers(1, 2)),
            "groups": draw(st.sampled_from((1, 2))),
            "bias": draw(st.booleans()),
            "padding_mode": draw(st.sampled_from(("zeros", "reflect"))),
        }
        if kwargs["padding"] == "valid":
            kwargs["padding_mode"] = "zeros"
    elif name.startswith("BatchNorm"):
        args = (C, draw(st.sampled_from((1e-5, 1e-3))), draw(st.sampled_from((0.1, 0.5, None))))
        kwargs = {"affine": draw(st.booleans()), "track_running_stats": draw(st.booleans())}
        if n == 1 and draw(st.booleans()):
            shape = [max(B, 2), C]
    elif name == "GroupNorm":
        args, shape = (2, C), [max(B, 2), C, *(draw(size) for _ in range(draw(st.integers(0, 2))))]
    elif name.startswith("MaxPool"):
        args = (kernel, stride, padding)
        kwargs = {"return_indices": draw(st.booleans()), "ceil_mode": draw(st.booleans())}
    elif name.startswith("MaxUnpool"):
        args = (2,)
    elif name.startswith("AvgPool"):
        args, kwargs = (kernel, stride), {"padding": padding, "count_include_pad": draw(st.booleans())}
    elif name.startswith("AdaptiveAvgPool"):
        args = (draw(small),)
    elif name == "Upsample":
        shape = [B, C, *(draw(st.integers(2, 4)) for _ in range(2))]
        kwargs = {"scale_factor": 2, "mode": draw(st.sampled_from(("nearest", "bilinear")))}
    elif name == "Linear":
        args, kwargs = (C, draw(small)), {"bias": draw(st.booleans())}
    elif name == "Flatten":
        shape = [B, C, draw(size), draw(size)]
        args = (draw(st.integers(1, 2)),)
    else:
        assert name == "VotingLayer"
        args = (2,)
    if draw(st.booleans()):  # the sixth, tenth ... positional argument, as their users may write it
        signature = inspect.signature(getattr(sj_layer, name)).bind(*args, **kwargs)
        signature.apply_defaults()
        if list(signature.arguments) == list(inspect.signature(getattr(sj_layer, name)).parameters):
            args, kwargs = (*tuple(signature.arguments.values())[:-1],), {}
    return name, args, kwargs, shape


@settings(max_examples=250)
@given(
    config=configured(),
    step_mode=st.sampled_from("sm"),
    by_position=st.booleans(),
    T=st.integers(1, 3),
    training=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_wrappers_are_theirs(config, step_mode, by_position, T, training, channels_last, seed):
    name, args, kwargs, shape = config
    torch.manual_seed(seed)
    their_class, our_class = getattr(sj_layer, name), getattr(layer, name)
    parameters = list(inspect.signature(their_class).parameters)
    if by_position and len(args) == len(parameters) - 1:
        theirs, ours = their_class(*args, step_mode), our_class(*args, step_mode)
    else:
        theirs, ours = (c(*args, step_mode=step_mode, **kwargs) for c in (their_class, our_class))
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert repr(theirs) == repr(ours)
    x = torch.randn([T, *shape] if step_mode == "m" else shape)
    extra: tuple = ()
    if name.startswith("MaxUnpool"):
        pool = getattr(sj_layer, name.replace("Unp", "P"))(2, return_indices=True, step_mode=step_mode)
        if step_mode == "m":
            x = torch.randn([T, *(s if i < 2 else s // 2 * 2 for i, s in enumerate(shape))])
        else:
            x = torch.randn([s if i < 2 else s // 2 * 2 for i, s in enumerate(shape)])
        x, indices = pool(x)
        extra = (indices,)
    if channels_last and len(shape) == 4:
        x = x.flatten(0, -4).contiguous(memory_format=torch.channels_last).view(x.shape)
    results = []
    for module in (theirs, ours):
        module.train(training)
        x_given = x.clone().requires_grad_()
        out = module(x_given, *extra)
        first = out[0] if isinstance(out, tuple) else out
        weight = torch.linspace(-1, 1, first.numel()).view(first.shape)
        leaves = [x_given, *module.parameters()]
        grads = torch.autograd.grad((first * weight).sum(), leaves)
        results.append((out if isinstance(out, tuple) else (out,), grads, list(module.buffers())))
    for theirs_, ours_ in zip(results[0], results[1], strict=True):
        assert len(theirs_) == len(ours_)
        for t, o in zip(theirs_, ours_, strict=True):
            assert torch.equal(t, o)
    if channels_last and len(shape) == 4 and first.dim() >= 4:
        for t, o in zip(results[0][0], results[1][0], strict=True):
            assert t.stride() == o.stride()


@pytest.mark.parametrize("name", WRAPPERS)
def test_constructor_arguments_order_and_defaults(name):
    theirs = list(inspect.signature(getattr(sj_layer, name)).parameters.values())
    ours = list(inspect.signature(getattr(layer, name)).parameters.values())
    if "Container" not in name:
        ours = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in ours] == [p.name for p in theirs]
    else:
        assert [p.kind for p in ours] == [p.kind for p in theirs]
    for o, t in zip(ours, theirs, strict=True):
        assert o.default == t.default


def test_what_comes_after_step_mode_is_given_by_name():
    conv = layer.Conv2d(2, 4, 3, dtype=torch.float64, step_mode="m")
    assert conv.weight.dtype == torch.float64
    with pytest.raises(TypeError, match="at most 10 positional"):
        layer.Conv2d(2, 4, 3, 1, 0, 1, 1, True, "zeros", "m", "cpu")


def test_wrappers_are_pytorchs_and_can_be_copied_pickled_and_subclassed():
    class Pointwise(layer.Conv2d):
        def __init__(self, channels, **kwargs):
            super().__init__(channels, channels, 1, **kwargs)

    conv = Pointwise(3, step_mode="m")
    assert isinstance(conv, nn.Conv2d)
    assert list(inspect.signature(Pointwise).parameters) == ["channels", "kwargs"]
    x = torch.randn(4, 2, 3, 5, 5)
    want = conv(x)
    assert torch.equal(copy.deepcopy(conv)(x), want)
    bn = pickle.loads(pickle.dumps(layer.BatchNorm2d(3, step_mode="m")))
    assert bn(x).shape == x.shape
    assert "BatchNorm2d" in layer.BatchNorm2d.__doc__
    assert torch.equal(conv(input=x), want)
    assert repr(conv).endswith("step_mode=m)")


@pytest.mark.parametrize("name", [n for n in WRAPPERS if spatial(n) and "Dropout" not in n])
def test_a_step_without_time_is_refused_in_multi_step_mode(name):
    n = spatial(name)
    args = (2, 2, 2) if name.startswith("Conv") else (2,)
    module = getattr(layer, name)(*args, step_mode="m")
    wrong = torch.randn(2, 2, *[4] * (n - 1 if "BatchNorm1" in name else n))
    if "BatchNorm1" in name:
        wrong = wrong[0]
    with pytest.raises(ValueError, match=r"x must be \[T, B, C.* in step mode 'm', got a tensor of shape"):
        module(wrong)


def test_a_constant_image_expanded_over_time_stays_channels_last():
    image = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    x = image.expand(4, *image.shape)
    assert (
        functional.seq_to_ann_forward(x, nn.Identity()).flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    )
    conv = layer.Conv2d(3, 5, 3, step_mode="m").to(memory_format=torch.channels_last)
    y = conv(x)
    assert y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y[3], nn.functional.conv2d(image, conv.weight, conv.bias), atol=1e-6)
    sequence = torch.randn(8, 3, 6, 6).contiguous(memory_format=torch.channels_last).view(4, 2, 3, 6, 6)
    assert network.fold_time(sequence).data_ptr() == sequence.data_ptr()


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_under_compile(step_mode):
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3),
        layer.BatchNorm2d(4),
        snnfast.IFNode(),
        layer.MaxPool2d(2),
        layer.Flatten(),
        layer.Linear(16, 3),
    )
    functional.set_step_mode(net, step_mode)
    x = torch.randn(*(3, 5) if step_mode == "m" else (5,), 2, 6, 6)
    net.eval()
    want = net(x)
    functional.reset_net(net)
    assert torch.allclose(torch.compile(net, fullgraph=True, backend="eager")(x), want, atol=1e-6)


def test_any_batch_size_can_be_exported():
    net = nn.Sequential(layer.Conv2d(2, 4, 3), layer.BatchNorm2d(4), snnfast.IFNode(), layer.MaxPool2d(2))
    net = nn.Sequential(net, layer.Flatten(), layer.Linear(16, 3)).eval()
    functional.set_step_mode(net, "m")
    program = torch.export.export(
        net, (torch.randn(3, 5, 2, 6, 6),), dynamic_shapes=({1: torch.export.Dim("B", min=2)},)
    )
    for B in (2, 3, 4):
        x = torch.randn(3, B, 2, 6, 6)
        functional.reset_net(net)
        assert torch.allclose(program.module()(x), net(x), atol=1e-6)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(("Dropout", "Dropout2d")),
    p=st.floats(0, 0.9),
    step_mode=st.sampled_from("sm"),
    T=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_dropout_draws_their_mask_once(kind, p, step_mode, T, seed):
    x = torch.randn(T, 3, 4, 2, 2)
    outputs = []
    for library in (sj_layer, layer):
        module = getattr(library, kind)(p, step_mode=step_mode)
        torch.manual_seed(seed)
        calls = []
        for _ in range(2):
            x_given = x.clone().requires_grad_()
            y = module(x_given) if step_mode == "m" else torch.stack([module(x_t) for x_t in x_given])
            calls += [y, *torch.autograd.grad(y.sum(), x_given)]
        module.reset()
        calls.append(module(x if step_mode == "m" else x[0]))
        module.eval()
        calls.append(module(x if step_mode == "m" else x[0]))
        outputs.append(calls)
    for theirs, ours in zip(*outputs, strict=True):
        assert torch.equal(theirs, ours)
    assert torch.equal(outputs[1][0], outputs[1][2])  # one mask until reset


def test_dropout_of_another_batch_starts_afresh():
    module = layer.Dropout(0.5, step_mode="m")
    module(torch.ones(2, 8))
    assert module(torch.ones(2, 5)).shape == (2, 5)  # the last, smaller batch
    assert module.mask.shape == (5,)
    assert module(torch.ones(2, 5, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match="p must be a probability"):
        layer.Dropout(1.0)


@pytest.mark.parametrize("kind", ["ThresholdDependent", "TemporalEffective"])
@pytest.mark.parametrize("dimensions", [0, 1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_over_time_are_theirs(kind, dimensions, training):
    name = f"{kind}BatchNorm{max(dimensions, 1)}d"
    args = (0.5, 0.8, 3, 1e-4) if kind == "ThresholdDependent" else (4, 3, 1e-4)
    x = torch.randn(4, 2, 3, *range(3, 3 + dimensions))
    results, keys = [], []
    for library in (sj_layer, layer):
        module = getattr(library, name)(*args).train(training)
        functional.set_step_mode(module, "m")
        if kind == "TemporalEffective":
            nn.init.uniform_(module.scale, generator=torch.Generator().manual_seed(1))
        y = module(x)
        grads = torch.autograd.grad(y.square().sum(), list(module.parameters()))
        results.append([y, *grads, *module.state_dict().values()])
        keys.append(list(module.state_dict()))
    assert keys[0] == keys[1]
    for t, o in zip(*results, strict=True):
        assert torch.equal(t, o)
    with pytest.raises(ValueError, match="step_mode must be 'm', got 's'"):
        functional.set_step_mode(module, "s")
    with pytest.raises(ValueError, match="x_seq must have"):
        module(torch.randn(4, 2, 3, *[2] * (dimensions + 2)))
    assert "Batch norm" in module.__doc__


def test_an_input_that_is_no_tensor_is_refused_by_name():
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor for Conv2d, got list"):
        layer.Conv2d(1, 2, 3, step_mode="m")([1.0, 2.0])


@pytest.mark.parametrize("training", [True, False])
def test_one_step_of_one_sample_in_channels_last_has_the_gradients_of_any_layout(training):
    net = nn.Sequential(layer.Conv2d(3, 16, 3, step_mode="m"), layer.BatchNorm2d(16, step_mode="m")).train(training)
    x, grad = torch.randn(1, 1, 3, 6, 6), torch.randn(1, 1, 16, 4, 4)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net.to(memory_format=memory_format).zero_grad()
        net(x).backward(grad)
        found.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
