"""The command line: ``python -m snnfast.train`` and ``snnfast-train``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import torch

from .errors import TrainError
from .experiment import run
from .options import parse

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0 done; 1 out of memory; 2 bad options, data or models; 3 a loss that is not finite; 4 a checkpoint that cannot be
    written or read; 130 stopped by Ctrl-C or SIGTERM. After 3, 4 and 130 ``--resume`` goes on from the last checkpoint.
    """
    # Lightning's advice is about its own loaders and launchers, which are not used.
    warnings.filterwarnings("ignore", module="lightning_fabric")
    try:
        run(parse(argv))
    except TrainError as error:
        print(f"snnfast-train: {error}", file=sys.stderr)
        return error.exit_code
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        print(f"snnfast-train: out of memory: {reason}; try --accumulate 2 or a smaller --batch-size", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("snnfast-train: stopped; checkpoints are kept: go on with --resume", file=sys.stderr)
        return 130
    return 0
