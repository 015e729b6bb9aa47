"""From a trained ANN to a spiking network without training again, on 5,000 real MNIST images.

    python examples/conversion.py

trains a small convolutional ANN for a few epochs and prints its test accuracy beside that of the spiking networks that
snnfast.to_spiking makes of it, for several numbers of time steps, with thresholds from a calibration batch of training
images and, to show what these do, without.
"""

from __future__ import annotations

import argparse
import time

import mnist_data
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfast

STEPS = (4, 8, 16, 32, 64)


def network() -> nn.Sequential:
    def block(cin: int, cout: int) -> list[nn.Module]:
        return [nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(), nn.MaxPool2d(2)]

    hidden = [nn.Flatten(), nn.Linear(24 * 49, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)]
    return nn.Sequential(*block(1, 12), *block(12, 24), *hidden)


def train(ann: nn.Module, data: mnist_data.Batch, epochs: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(ann.parameters(), 3e-3)
    steps = epochs * (len(data[0]) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps)
    for _ in range(epochs):
        for images, digits in mnist_data.batches(data, 100, generator, shift=2):
            optimizer.zero_grad()
            F.cross_entropy(ann(images), digits).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(net: nn.Module, data: mnist_data.Batch) -> float:
    """Share of digits that the logits, or their mean over time, get right."""
    right = 0
    for images, digits in zip(data[0].split(100), data[1].split(100), strict=True):
        logits: Tensor = net(images)
        right += int(((logits if logits.dim() == 2 else logits.mean(0)).argmax(1) == digits).sum())
    return right / len(data[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    training, test = mnist_data.tensors(arguments.seed, torch.device("cpu"))

    start = time.perf_counter()
    ann = network()
    train(ann.train(), training, arguments.epochs, generator)
    ann.eval()
    print(f"trained for {arguments.epochs} epochs in {time.perf_counter() - start:.0f} s on {len(training[0])} images")
    print(f"ANN: {100 * accuracy(ann, test):.2f} % of {len(test[0])} test images\n")

    batch = training[0][:500]
    rows = {
        "99.9th percentile": snnfast.to_spiking(ann, STEPS[0], calibration=batch, percentile=99.9),
        "maximum": snnfast.to_spiking(ann, STEPS[0], calibration=batch, percentile=100),
        "none (threshold 1)": snnfast.to_spiking(ann, STEPS[0], snnfast.IFNode, v_reset=None),
    }
    print(f"{'calibration':<20}" + "".join(f"{f'T = {T}':>10}" for T in STEPS))
    for name, net in rows.items():
        found = []
        for T in STEPS:
            net.timesteps = T
            found.append(100 * accuracy(net, test))
        print(f"{name:<20}" + "".join(f"{a:>8.2f} %" for a in found), flush=True)


if __name__ == "__main__":
    main()
