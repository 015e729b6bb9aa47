"""Training from the command line: a teacher, a plain spiking network and distilled ones, compared.

``python -m snnfast.train --help`` says how. From Python:

>>> from snnfast.train import Config
>>> config = Config(data="mnist5k", timesteps=2, distill=["logit", "temporal,spatial"]).check()
>>> config.distilled()
[('logit',), ('temporal', 'spatial')]

and ``run(config)`` trains.
"""

from __future__ import annotations

from typing import Any

from .config import Config
from .errors import CheckpointError, InputError, Interrupted, NonFiniteError, TrainError

__all__ = ["CheckpointError", "Config", "InputError", "Interrupted", "NonFiniteError", "TrainError", "main", "run"]


def run(config: Config) -> dict[str, Any]:
    """Train what ``config`` asks for; see :func:`snnfast.train.experiment.run`."""
    from .experiment import run as run_experiment

    return run_experiment(config)


def main() -> int:
    """The command ``snnfast-train``."""
    from .cli import main as command

    return command()
