"""Encodings of static inputs, and losses over time, against their definitions and SpikingJelly's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from snnfast import encoding, functional, losses


def theirs(name: str):
    return pytest.importorskip(f"spikingjelly.activation_based.{name}", reason="spikingjelly is not installed")


def test_direct_is_the_input_at_every_step_and_takes_no_memory():
    x = torch.rand(3, 2, 4, requires_grad=True)
    y = encoding.direct(x, 5)
    assert y.shape == (5, 3, 2, 4)
    assert all(torch.equal(step, x) for step in y)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 5.0))


def test_poisson_is_seeded_independent_and_of_the_right_rate():
    x = torch.tensor([-0.5, 0.0, 0.1, 0.5, 0.9, 1.0, 1.5]).repeat(2000, 1)
    s = encoding.poisson(x, 20, torch.Generator().manual_seed(3))
    assert torch.equal(s, encoding.poisson(x, 20, torch.Generator().manual_seed(3)))
    assert not torch.equal(s, encoding.poisson(x, 20, torch.Generator().manual_seed(4)))
    assert set(s.unique().tolist()) == {0.0, 1.0}
    rate = s.mean((0, 1))
    assert torch.equal(rate[[0, 1, 5, 6]], torch.tensor([0.0, 0.0, 1.0, 1.0]))  # exactly
    assert torch.allclose(rate[2:5], x[0, 2:5], atol=4 * 0.5 / 40000**0.5)  # four standard deviations
    # Steps are independent: together as often as the product says.
    both = (s[:-1] * s[1:]).mean((0, 1))
    assert torch.allclose(both[2:5], x[0, 2:5] ** 2, atol=4 * 0.5 / 38000**0.5)
    torch.manual_seed(0)
    default = encoding.poisson(x, 2)
    torch.manual_seed(0)
    assert torch.equal(default, encoding.poisson(x, 2))


def test_poisson_is_exported_for_any_batch_size():
    class Encoder(torch.nn.Module):
        def forward(self, x):
            return encoding.poisson(x, 3)

    x = torch.rand(4, 5)
    program = torch.export.export(Encoder(), (x,), dynamic_shapes=({0: torch.export.Dim("B")},)).module()
    assert torch.equal(program(torch.ones(7, 5)), torch.ones(3, 7, 5))


def test_poisson_of_zero_never_spikes_even_at_a_draw_of_zero(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **kwargs: torch.zeros(shape))
    assert encoding.poisson(torch.tensor([0.0, 1e-6]), 2).tolist() == [[0.0, 1.0], [0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_encodings_keep_dtype_and_small_rates(dtype):
    x = torch.full((200, 100), 0.001).to(dtype)
    s = encoding.poisson(x, 20, torch.Generator().manual_seed(0))
    assert s.dtype == dtype
    assert abs(s.float().mean().item() / x[0, 0].item() - 1) < 0.25
    assert encoding.latency(x, 4).dtype == dtype


@settings(max_examples=60)
@given(T=st.integers(1, 12), kind=st.sampled_from(("linear", "log")), seed=st.integers(0, 10**6), double=st.booleans())
def test_latency_is_theirs(T, kind, seed, double):
    torch.manual_seed(seed)
    x = torch.rand(3, 4, 2, dtype=torch.float64 if double else torch.float32)
    x[0, 0], x[0, 1] = 0.0, 1.0
    encoder = theirs("encoding").LatencyEncoder(T, kind)
    want = torch.stack([encoder(x) for _ in range(T)])
    got = encoding.latency(x, T, kind)
    assert torch.equal(got, want)
    assert torch.equal(got.sum(0), torch.ones_like(x))  # one spike each
    ours = encoding.LatencyEncoder(T, kind)
    assert torch.equal(torch.stack([ours(x), *[ours() for _ in range(T - 1)]]), want)
    assert torch.equal(ours(), want[0])  # round again
    ours.reset()
    with pytest.raises(ValueError, match="x must be given at the first call"):
        ours()


def test_latency_is_earlier_for_larger_values_and_clamps():
    s = encoding.latency(torch.tensor([2.0, 1.0, 0.6, 0.3, 0.0, -1.0]), 5)
    assert s.argmax(0).tolist() == [0, 0, 2, 3, 4, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("T", "kind"), [(16, "log"), (81, "log"), (82, "log"), (600, "linear"), (800, "log")])
def test_latency_of_long_sequences_and_half_precision(dtype, T, kind):
    from decimal import Decimal

    x = torch.tensor([0.0, 1e-30, 0.01, 0.25, 0.7, 1.0]).to(dtype)
    s = encoding.latency(x, T, kind)
    assert s.dtype == dtype
    assert torch.equal(s.sum(0), torch.ones_like(x))
    last = Decimal(T - 1)
    for found, value in zip(s.argmax(0).tolist(), map(Decimal, x.tolist()), strict=True):
        exact = last * (1 - value) if kind == "linear" else last - (1 + (last.exp() - 1) * value).ln()
        assert abs(found - exact) < Decimal("0.501")


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_poisson_encoder_draws_theirs(step_mode):
    x = torch.rand(4, 5, 6)
    outputs = []
    for library in (theirs("encoding"), encoding):
        torch.manual_seed(5)
        encoder = library.PoissonEncoder(step_mode=step_mode)
        outputs.append(encoder(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("encode", [encoding.direct, encoding.poisson, encoding.latency])
def test_wrong_input_of_encodings(encode):
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got uint8"):
        encode(torch.zeros(3, dtype=torch.uint8), 4)
    with pytest.raises(TypeError, match="got list"):
        encode([0.5], 4)
    for wrong in (0, 2.0, True):
        with pytest.raises(ValueError, match="timesteps must be a whole number from 1"):
            encode(torch.zeros(3), wrong)


def test_wrong_latency_encoding():
    with pytest.raises(ValueError, match="encoding must be 'linear' or 'log', got 'exp'"):
        encoding.latency(torch.zeros(3), 4, "exp")
    with pytest.raises(ValueError, match="timesteps"):
        encoding.LatencyEncoder(0)


# ---- losses ----
def tet_of_the_paper(outputs, labels, means, lamb):
    """The loss as its authors' code writes it, with batch first."""
    T = outputs.size(1)
    per_step = 0
    for t in range(T):
        per_step += F.cross_entropy(outputs[:, t, ...], labels)
    distance = torch.nn.MSELoss()(outputs, torch.zeros_like(outputs).fill_(means))
    return (1 - lamb) * per_step / T + lamb * distance


@settings(max_examples=40)
@given(T=st.integers(1, 6), B=st.integers(1, 5), C=st.integers(2, 7), weight=st.floats(0, 1), means=st.floats(0.5, 2))
def test_tet_is_the_papers(T, B, C, weight, means):
    torch.manual_seed(T * 100 + B)
    out_seq = torch.randn(T, B, C, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, C, (B,))
    want = tet_of_the_paper(out_seq.transpose(0, 1), target, means, weight)
    got = losses.tet_loss(out_seq, target, means, weight)
    assert torch.allclose(got, want)
    grads = [torch.autograd.grad(loss, out_seq)[0] for loss in (want, got)]
    assert torch.allclose(*grads)
    none = losses.tet_loss(out_seq, target, means, weight, reduction="none")
    assert none.shape == (B,)
    assert torch.allclose(none.mean(), got)
    assert torch.allclose(losses.tet_loss(out_seq, target, means, weight, reduction="sum"), none.sum())


def test_tet_without_regulariser_is_spikingjellys():
    out_seq, target = torch.randn(4, 3, 6), torch.tensor([0, 5, 2])
    want = theirs("functional").temporal_efficient_training_cross_entropy(out_seq, target)
    assert torch.allclose(losses.tet_loss(out_seq, target, weight=0.0), want)
    assert torch.allclose(functional.temporal_efficient_training_cross_entropy(out_seq, target), want)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_of_the_rate(reduction):
    out_seq, target = (torch.rand(5, 4, 3) < 0.4).float(), torch.tensor([0, 2, 1, 1])
    rate = sum(out_seq) / 5
    got = losses.rate_cross_entropy(out_seq, target, label_smoothing=0.1, reduction=reduction)
    assert torch.allclose(got, F.cross_entropy(rate, target, label_smoothing=0.1, reduction=reduction))
    one_hot = functional.redundant_one_hot(target, 3, 1)
    got = losses.rate_mse(out_seq, target, reduction=reduction)
    want = F.mse_loss(rate, one_hot, reduction="none").mean(1)
    assert torch.allclose(got, {"mean": want.mean(), "sum": want.sum(), "none": want}[reduction])
    assert torch.equal(got, losses.rate_mse(out_seq, one_hot, reduction=reduction))


def test_probabilities_as_targets():
    out_seq, target = torch.randn(5, 4, 3), torch.tensor([0, 2, 1, 1])
    one_hot = F.one_hot(target, 3).float()
    for loss in (losses.rate_cross_entropy, losses.tet_loss):
        assert torch.allclose(loss(out_seq, target), loss(out_seq, one_hot))


def test_half_precision_losses_are_taken_in_float32():
    out_seq, target = torch.randn(5, 4, 3).bfloat16(), torch.tensor([0, 2, 1, 1])
    for loss in (losses.rate_cross_entropy, losses.tet_loss, losses.rate_mse):
        assert loss(out_seq, target).dtype == torch.float32
        assert torch.equal(loss(out_seq, target), loss(out_seq.float(), target))


@pytest.mark.parametrize("loss", [losses.rate_cross_entropy, losses.tet_loss, losses.rate_mse])
def test_wrong_shapes_of_losses(loss):
    with pytest.raises(ValueError, match=r"out_seq must have at least one time step, got \(0, 4, 3\)"):
        loss(torch.zeros(0, 4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"out_seq must be \[T, B, C\], got \(4, 3\)"):
        loss(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"target must be classes \[B\] = \(4,\) or probabilities"):
        loss(torch.zeros(2, 4, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="reduc"):
        loss(torch.zeros(2, 4, 3), torch.zeros(4, dtype=torch.int64), reduction="median")

    with pytest.raises(TypeError, match=r"target must be a tensor of int64 classes .* got int32"):
        loss(torch.zeros(2, 4, 3), torch.zeros(4, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"target must be .* got list"):
        loss(torch.zeros(2, 4, 3), [0, 0, 0, 0])


@pytest.mark.parametrize("loss", [losses.rate_cross_entropy, losses.tet_loss, losses.rate_mse])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_samples_without_a_label_have_no_part(loss, reduction):
    out = torch.randn(3, 5, 4, requires_grad=True)
    labels, kept = torch.tensor([1, -100, 3, 0, -100]), torch.tensor([0, 2, 3])
    got, want = loss(out, labels, reduction=reduction), loss(out[:, kept], labels[kept], reduction=reduction)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y, out)[0] for y in (got, want)))
    each = loss(out, labels, reduction="none")
    assert each[[1, 4]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(each[kept], loss(out[:, kept], labels[kept], reduction="none"))


@pytest.mark.parametrize("loss", [losses.rate_cross_entropy, losses.tet_loss, losses.rate_mse])
def test_class_156_as_uint8_is_a_class(loss):
    out, target = torch.randn(3, 2, 200), torch.tensor([156, 4])
    assert torch.equal(loss(out, target.to(torch.uint8)), loss(out, target))


@pytest.mark.parametrize("loss", [losses.rate_cross_entropy, losses.tet_loss, losses.rate_mse])
def test_classes_are_whole_numbers(loss):
    with pytest.raises(TypeError, match=r"target of shape \(2,\) must be classes, int64, got float32"):
        loss(torch.randn(3, 2, 4), torch.tensor([0.5, 1.7]))


@pytest.mark.parametrize("loss", [losses.rate_cross_entropy, losses.tet_loss])
def test_probabilities_are_floating_point(loss):
    one_hot, out = torch.eye(4, dtype=torch.int64)[:2], torch.randn(3, 2, 4)
    with pytest.raises(TypeError, match=r"target of shape \(2, 4\) must be probabilities, got int64"):
        loss(out, one_hot)
    assert losses.rate_mse(out, one_hot) == losses.rate_mse(out, torch.tensor([0, 1]))


def test_latency_encoder_starts_afresh_with_another_batch():
    encoder = encoding.LatencyEncoder(4)
    first, second = torch.rand(3, 5), torch.rand(2, 5)
    encoder(first), encoder(first)
    assert torch.equal(encoder(second), encoding.latency(second, 4)[0])
    assert torch.equal(encoder(), encoding.latency(second, 4)[1])


def test_poisson_encoder_of_zero_never_spikes_in_half_precision():
    assert encoding.PoissonEncoder()(torch.zeros(100_000, dtype=torch.bfloat16)).sum() == 0


def test_wrong_weight():
    with pytest.raises(TypeError, match="weight must be a number"):
        losses.tet_loss(torch.randn(3, 2, 4), torch.tensor([0, 1]), weight="0.5")
    with pytest.raises(ValueError, match=r"weight must be from 0 to 1, got 1\.5"):
        losses.tet_loss(torch.zeros(2, 4, 3), torch.zeros(4, dtype=torch.int64), weight=1.5)


def test_encoders_that_are_not_here_name_their_import():
    with pytest.raises(AttributeError, match=r"keeps its import, spikingjelly.activation_based.encoding"):
        encoding.WeightedPhaseEncoder  # noqa: B018
