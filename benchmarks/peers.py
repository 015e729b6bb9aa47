"""``python -m benchmarks.peers``: models of SpikingJelly, snnTorch and Norse, as written and with snnfast.

Neurons alone, forward and backward, on the shapes that they have in their networks; whole training steps; and
``unroll`` on both tutorial networks of snnTorch beside the ceiling, the same step with neurons that cost nothing.
Every ratio is of one run.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnfast
from snnfast import dynamics, functional

from .measure import RESULTS, compare, environment, keep_memory, per_call, refuse_unless_idle, where_memory_is_kept
from .report import markdown, shown
from .rows import VERDICT, Row

warnings.filterwarnings("ignore", category=SyntaxWarning)

T = 25  # time steps of snnTorch's tutorials


# ---- the networks, as their authors' tutorials and model zoos write them ----
def spiking_resnet_stack(blocks: int) -> nn.Module:
    """Basic blocks of SpikingJelly's spiking ResNet-18 at the width of its first stage, multi-step."""
    from spikingjelly.activation_based import functional as theirs
    from spikingjelly.activation_based import layer, neuron, surrogate

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv1, self.conv2 = (layer.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
            self.bn1, self.bn2 = layer.BatchNorm2d(channels), layer.BatchNorm2d(channels)
            self.sn1, self.sn2 = (neuron.IFNode(surrogate_function=surrogate.ATan(), detach_reset=True) for _ in "12")

        def forward(self, x: Tensor) -> Tensor:
            out = self.sn1(self.bn1(self.conv1(x)))
            return self.sn2(self.bn2(self.conv2(out)) + x)

    net = nn.Sequential(*(Block(64) for _ in range(blocks)))
    theirs.set_step_mode(net, "m")
    return net


def snntorch_fully_connected() -> nn.Module:
    """Tutorial 5's network; its loop over time stands in the training step."""
    import snntorch

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(28 * 28, 1000), snntorch.Leaky(beta=0.95)
            self.fc2, self.lif2 = nn.Linear(1000, 10), snntorch.Leaky(beta=0.95)

        def forward(self, x: Tensor, mem1: Tensor, mem2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            return spk2, mem1, mem2

    return Net()


def snntorch_convolutional() -> nn.Sequential:
    """Tutorial 6's network."""
    import snntorch
    from snntorch import surrogate

    common: dict[str, Any] = {"beta": 0.5, "spike_grad": surrogate.fast_sigmoid(slope=25), "init_hidden": True}
    return nn.Sequential(
        nn.Conv2d(1, 12, 5),
        nn.MaxPool2d(2),
        snntorch.Leaky(**common),
        nn.Conv2d(12, 64, 5),
        nn.MaxPool2d(2),
        snntorch.Leaky(**common),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
        snntorch.Leaky(**common, output=True),
    )


def norse_convolutional() -> nn.Module:
    """The MNIST network of Norse's tutorial, with its own loop over time."""
    import norse.torch as norse

    class ConvNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
            self.fc1, self.out = nn.Linear(4 * 4 * 50, 500), norse.LILinearCell(500, 10)
            self.lif0, self.lif1, self.lif2 = norse.LIFCell(), norse.LIFCell(), norse.LIFCell()

        def forward(self, x: Tensor) -> Tensor:
            s0 = s1 = s2 = so = None
            voltages = []
            for step in x:
                z, s0 = self.lif0(self.conv1(step), s0)
                z, s1 = self.lif1(10 * self.conv2(F.max_pool2d(z, 2, 2)), s1)
                z, s2 = self.lif2(self.fc1(F.max_pool2d(z, 2, 2).flatten(1)), s2)
                v, so = self.out(torch.relu(z), so)
                voltages.append(v)
            return torch.stack(voltages)

    return ConvNet()


# ---- neurons alone ----
def random_steps(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=generator).mul_(1.2).add_(0.3)
    return x, torch.randn(*shape, generator=generator)


def multi_step(neuron: Any, x: Tensor, grad: Tensor, reset: Callable[[], None]) -> Callable[[], None]:
    leaf = x.clone().requires_grad_()

    def run() -> None:
        reset()
        out = neuron(leaf)
        torch.autograd.grad(out[0] if isinstance(out, tuple) else out, leaf, grad)

    return run


def own_loop(neuron: Any, x: Tensor, grad: Tensor, start: Callable[[], Any]) -> Callable[[], None]:
    """The user's loop: states passed on, spikes collected; inputs and gradients come as separate tensors per step."""
    leaves, grads = [step.clone().requires_grad_() for step in x], list(grad)

    def run() -> None:
        state, spikes = start(), []
        for step in leaves:
            s, state = neuron(step, state)
            spikes.append(s)
        torch.autograd.grad(spikes, leaves, grads)

    return run


def memory_of_own_loop(x: Tensor, grad: Tensor) -> Callable[[], None]:
    """What any neuron in such a loop has to read and write, by four of PyTorch's operations a step, without autograd:
    forward the input and the state in, spikes and the state out; backward these and two gradients in, two out."""
    inputs, grads = list(x), list(grad)

    def run() -> None:
        v, kept = inputs[0], []
        for step in inputs:
            s, v = torch.add(step, v), torch.add(step, v, alpha=0.5)
            kept.append((s, v))
        grad_v, found = grads[0], []
        for step, grad_s, (_, v) in zip(reversed(inputs), reversed(grads), reversed(kept), strict=True):
            grad_x = torch.addcmul(grad_s, step, v)
            grad_v = torch.add(grad_x, grad_v)
            found.append(grad_x)

    return run


def neuron_row(
    work: str,
    make: Callable[[], Any],
    drive: Callable[[Any], Callable[[], None]],
    target: float,
    seconds: float,
    ceiling: Callable[[], None] | None = None,
) -> Row:
    fast, plain = make(), make()
    report = snnfast.accelerate(fast)
    if not report.replaced:
        raise SystemExit(f"{work}: {report}")
    calls = {"plain": drive(plain), "fast": drive(fast)}
    t = compare(calls if ceiling is None else {**calls, "ceiling": ceiling}, seconds=seconds)
    note = f"{t['plain'] * 1e3:.3g} ms -> {t['fast'] * 1e3:.3g} ms"
    if ceiling is not None:
        note += f"; its memory traffic alone: {t['plain'] / t['ceiling']:.3g} times"
    return Row(work, "as written", t["plain"] / t["fast"], target, True, "times", note)


def neurons(quick: bool) -> Iterator[Row]:
    """Forward and backward of one neuron, on shapes of the networks above."""
    import norse.torch as norse
    import snntorch
    from spikingjelly.activation_based import neuron, surrogate

    seconds, batch = (0.05, 2) if quick else (1.0, 16)

    def nothing() -> None:
        return None

    def own_loop_target(x: Tensor, grad: Tensor, seconds: float) -> tuple[float, float, Callable[[], None] | None]:
        large = x[0].numel() >= 10_000
        return 5.0 if large else 3.0, seconds, memory_of_own_loop(x, grad) if large else None

    for name, shape in (("stage 1", (4, batch, 64, 32, 32)), ("stage 4", (4, batch, 512, 4, 4))):
        x, grad = random_steps(*shape)
        yield neuron_row(
            f"SpikingJelly IFNode, multi-step, {name} {list(shape)}",
            lambda: neuron.IFNode(surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m"),
            lambda n, x=x, grad=grad: multi_step(n, x, grad, n.reset),
            8.0,
            seconds,
        )
    for name, shape in (("conv1", (T, batch, 20, 24, 24)), ("conv2", (T, batch, 50, 8, 8))):
        x, grad = random_steps(*shape)
        yield neuron_row(
            f"Norse LIF, multi-step, {name} {list(shape)}",
            norse.LIF,
            lambda n, x=x, grad=grad: multi_step(n, x, grad, nothing),
            8.0,
            seconds,
        )
    for name, size in (("conv1", (128, 12, 12, 12)), ("conv2", (128, 64, 4, 4)), ("output", (128, 10))):
        x, grad = random_steps(T, *(2 if quick else size[0], *size[1:]))
        yield neuron_row(
            f"snnTorch Leaky, own loop, {name} {list(x.shape)}",
            lambda: snntorch.Leaky(beta=0.5, spike_grad=snntorch.surrogate.fast_sigmoid(slope=25)),
            lambda n, x=x, grad=grad: own_loop(n, x, grad, n.init_leaky),
            *own_loop_target(x, grad, seconds),
        )
    for name, size in (("conv1", (20, 24, 24)), ("conv2", (50, 8, 8)), ("fc1", (500,))):
        x, grad = random_steps(T, batch, *size)
        yield neuron_row(
            f"Norse LIFCell, own loop, {name} {list(x.shape)}",
            norse.LIFCell,
            lambda n, x=x, grad=grad: own_loop(n, x, grad, nothing),
            *own_loop_target(x, grad, seconds),
        )
    x, grad = random_steps(T, 128, 10)

    def start_and_call(n: Any) -> Callable[[], None]:
        return own_loop(lambda step, state: (n(step), None), x, grad, n.reset)

    yield neuron_row(
        "SpikingJelly LIFNode, own loop, output [25, 128, 10]", neuron.LIFNode, start_and_call, 3.0, seconds
    )


def overhead(quick: bool) -> Iterator[Row]:
    """What an adapter adds to the functional call, which it makes over time and goes around for one step."""
    import norse.torch as norse
    import snntorch
    from spikingjelly.activation_based import neuron, surrogate

    calls = 500 if quick else 5000
    kind, x = snnfast.surrogate.ATan(), torch.randn(4, 8)
    node = neuron.LIFNode(surrogate_function=surrogate.ATan(), step_mode="m")
    leaky, cell = snntorch.Leaky(beta=0.9), norse.LIF()
    for module in (node, leaky, cell):
        snnfast.accelerate(module)
    one, zero, rate = torch.tensor(1.0), torch.zeros(8), torch.tensor(0.1)
    keywords: dict[str, Any] = {"strict": True, "surrogate_function": kind}
    pairs = {
        "SpikingJelly LIFNode, multi-step": (
            lambda: node(x),
            lambda: functional.multi_step(dynamics.LIF, x, zero, surrogate_function=kind),
        ),
        "Norse LIF, multi-step": (
            lambda: cell(x),
            lambda: functional.multi_step(dynamics.CURRENT_LIF, x, (0.0, 0.0), None, (one, rate, rate), **keywords),
        ),
        "snnTorch Leaky, one step": (
            lambda: leaky(x[0], zero),
            lambda: functional.multi_step(dynamics.LEAKY, x[:1], zero, None, (one, rate), **keywords),
        ),
    }
    with torch.no_grad():
        for work, (adapter, ours) in pairs.items():
            found = [per_call(call, calls) * 1e6 for call in (adapter, ours)]
            note = f"{found[0]:.3g} us for {found[1]:.3g} us"
            yield Row(f"{work}: adapter", "functional call", found[0] - found[1], 5.0, False, "us", note)


# ---- training steps ----
def training_step(net: nn.Module, outputs: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    """Forward, cross-entropy over all steps ``[T, B, classes]``, backward, Adam."""
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-4)

    def run() -> None:
        optimizer.zero_grad()
        out = outputs(net)
        target = torch.arange(out.shape[1]) % out.shape[2]
        F.cross_entropy(out.flatten(0, 1), target.repeat(out.shape[0])).backward()
        optimizer.step()

    return run


def step_rows(
    work: str, steps: dict[str, Callable[[], None]], targets: dict[str, float], seconds: float
) -> Iterator[Row]:
    t = compare(steps, seconds=seconds)
    first = next(iter(steps))
    for name in steps:
        if name != first:
            note = f"{t[first] * 1e3:.3g} ms -> {t[name] * 1e3:.3g} ms"
            yield Row(f"{work}: {name}", first, t[first] / t[name], targets.get(name, 1.0), True, "times", note)


def training(quick: bool) -> Iterator[Row]:
    """Whole training steps, as written and accelerated, with the loop over time where the user has one."""
    from snntorch import utils
    from spikingjelly.activation_based import functional as theirs

    seconds, batch = (0.1, 2) if quick else (8.0, 16)

    def both(net: nn.Module, outputs: Callable[[nn.Module], Tensor]) -> dict[str, Callable[[], None]]:
        fast = copy.deepcopy(net)
        snnfast.accelerate(fast)
        return {"as written": training_step(net, outputs), "accelerated": training_step(fast, outputs)}

    x, _ = random_steps(4, batch, 64, 32, 32)

    def stack(net: nn.Module) -> Tensor:
        theirs.reset_net(net)
        return net(x).mean((3, 4))

    yield from step_rows(
        "SpikingJelly ResNet-18 blocks", both(spiking_resnet_stack(1 if quick else 2), stack), {}, seconds
    )
    digits, _ = random_steps(T, batch * 2, 1, 28, 28)
    yield from step_rows("Norse tutorial network", both(norse_convolutional(), lambda net: net(digits)), {}, seconds)

    image = digits[0]

    def loop(net: nn.Module) -> Tensor:
        reset_states(net, utils)
        return torch.stack([net(image)[1] for _ in range(T)])

    yield from step_rows("snnTorch tutorial 6 network", both(snntorch_convolutional(), loop), {}, seconds)


def reset_states(net: nn.Module, utils: Any) -> None:
    """snnTorch's reset; copies made by deepcopy are not in its list of instances, so each is reset itself."""
    for module in net.modules():
        if hasattr(module, "reset_mem"):
            module.reset_mem()


# ---- unroll ----
def unrolled(quick: bool) -> Iterator[Row]:
    """snnTorch's two tutorial networks with a constant input: their loop, accelerated, unrolled, and the ceiling."""
    from snntorch import utils

    seconds, batch = (0.1, 4) if quick else (10.0, 128)
    x, _ = random_steps(batch, 28 * 28)
    nothing = torch.zeros(0)

    def loop(net: nn.Module) -> Tensor:
        state: Any = net.lif1.init_leaky(), net.lif2.init_leaky()
        found = []
        for _ in range(T):
            _, *state = net(x, *state)
            found.append(state[1])
        return torch.stack(found)

    def unroll(net: nn.Module) -> Tensor:
        return snnfast.unroll(net, x, T, state=(nothing, nothing))[2]

    def free(net: nn.Module) -> Tensor:
        """The layers as unroll calls them, without any neuron."""
        current = net.fc1(x)
        return net.fc2(current.expand(T, *current.shape).flatten(0, 1)).unflatten(0, (T, -1))

    targets = {"unrolled": 1.5}
    yield from step_rows(
        "snnTorch tutorial 5 network, constant input",
        contenders(snntorch_fully_connected(), loop, unroll, free),
        targets,
        seconds,
    )
    image = x.view(batch, 1, 28, 28)

    def conv_loop(net: nn.Module) -> Tensor:
        reset_states(net, utils)
        return torch.stack([net(image)[1] for _ in range(T)])

    def conv_unroll(net: nn.Module) -> Tensor:
        reset_states(net, utils)
        return snnfast.unroll(net, image, T)[1]

    def conv_free(net: Any) -> Tensor:
        current = net[1](net[0](image))
        out = net[4](net[3](current.expand(T, *current.shape).flatten(0, 1)))
        return net[7](net[6](out)).unflatten(0, (T, -1))

    yield from step_rows(
        "snnTorch tutorial 6 network, constant input",
        contenders(snntorch_convolutional(), conv_loop, conv_unroll, conv_free),
        targets,
        seconds,
    )


def unrolled_with_kept_memory(quick: bool) -> Iterator[Row]:
    """The same where the process keeps freed memory: unrolled, some tensors are larger than malloc keeps by itself."""
    if quick:
        return
    try:
        found = where_memory_is_kept("peers", "unroll")
    except RuntimeError as error:
        yield Row("unrolled, keep_freed_memory()", "as written", None, None, True, "times", str(error))
        return
    for row in found:
        row["work"] += ", keep_freed_memory()"
        yield Row(**row)


def contenders(
    net: nn.Module,
    loop: Callable[[nn.Module], Tensor],
    unroll: Callable[[nn.Module], Tensor],
    free: Callable[[nn.Module], Tensor],
) -> dict[str, Callable[[], None]]:
    fast, over_time, ceiling = (copy.deepcopy(net) for _ in range(3))
    snnfast.accelerate(fast)
    snnfast.accelerate(over_time)
    return {
        "as written": training_step(net, loop),
        "accelerated": training_step(fast, loop),
        "unrolled": training_step(over_time, unroll),
        "ceiling: free neurons": training_step(ceiling, free),
    }


GROUPS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "neurons": neurons,
    "overhead": overhead,
    "training": training,
    "unroll": unrolled,
    "kept": unrolled_with_kept_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("groups", nargs="*", help=f"some of {', '.join(GROUPS)}; all where none is named")
    parser.add_argument("--quick", action="store_true", help="small shapes and few runs, to see that it works")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too (the result says so)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)  # of where_memory_is_kept
    arguments = parser.parse_args()
    unknown = set(arguments.groups) - set(GROUPS)
    if unknown:
        parser.error(f"unknown groups {sorted(unknown)}; there are {', '.join(GROUPS)}")
    if arguments.kept:
        keep_memory()
        rows = [row for name in arguments.groups for row in GROUPS[name](arguments.quick)]
        print(json.dumps([asdict(row) for row in rows]))
        return
    refuse_unless_idle(arguments.force or arguments.quick)
    device = environment()
    rows: list[Row] = []
    for name in arguments.groups or GROUPS:
        for row in GROUPS[name](arguments.quick):
            rows.append(row)
            print("  ".join(shown(row)), flush=True)
    missed = [r for r in rows if r.met is False]
    print(f"{len(rows) - len(missed)} of {len(rows)} targets met")
    if arguments.quick:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = {"device": device, "rows": [{**asdict(r), "verdict": VERDICT[r.met]} for r in rows]}
    (arguments.out / "peers.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / "peers.md").write_text(markdown(rows, device).replace("# CPU targets", "# Peers' models", 1))


if __name__ == "__main__":
    main()
