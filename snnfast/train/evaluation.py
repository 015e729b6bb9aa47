"""Accuracy, loss and firing rates of a network on a split."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..analysis._modules import evaluating, spiking_modules
from .augment import Augment
from .data import Store
from .objective import readout

__all__ = ["evaluate", "laid_out"]


@torch.no_grad()
def evaluate(
    network: nn.Module,
    store: Store,
    augment: Augment,
    batch_size: int,
    fabric: Any = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> dict[str, Any]:
    """Accuracy and loss on a split, and the firing rate of each layer (spikes per neuron and time step).

    Processes take every n-th image each and add up.
    """
    from ..analysis import FiringRateMonitor

    world, rank = (fabric.world_size, fabric.global_rank) if fabric is not None else (1, 0)
    device = store.labels.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # right answers, loss, images
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(network))
        monitor = stack.enter_context(FiringRateMonitor(network)) if spiking_modules(network) else None
        if fabric is not None:
            stack.enter_context(fabric.autocast())
        for indices in torch.arange(rank, len(store), world, device=device).split(batch_size):
            functional.reset_net(network)
            inputs = laid_out(augment.normalise(store.gather(indices)), layout)
            labels = store.labels[indices]
            logits = readout(network(inputs)).float()
            right = (logits.argmax(1) == labels).sum()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack((right, loss, torch.tensor(len(labels), device=device))).double()
        rates = monitor.rates() if monitor is not None else {}
        mean_rate = monitor.mean() if monitor is not None else None
    functional.reset_net(network)
    if world > 1:
        # Every process saw as many images but one: the rates' plain mean will do.
        figures = torch.tensor([mean_rate or 0.0, *rates.values()], dtype=torch.float64, device=device)
        sums, figures = fabric.all_reduce(sums, reduce_op="sum"), fabric.all_reduce(figures, reduce_op="mean")
        rates = dict(zip(rates, figures[1:].tolist(), strict=True))
        mean_rate = figures[0].item() if monitor is not None else None
    right_answers, loss_sum, images = sums.tolist()
    return {"accuracy": right_answers / images, "loss": loss_sum / images, "rate": mean_rate, "rates": rates}


def laid_out(inputs: Tensor, layout: torch.memory_format) -> Tensor:
    """``[B, C, H, W]`` in a memory layout; event frames ``[T, B, C, H, W]`` keep theirs."""
    return inputs.contiguous(memory_format=layout) if inputs.dim() == 4 else inputs
