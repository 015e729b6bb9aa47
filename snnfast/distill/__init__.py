"""Training by distillation: from a teacher, from more time steps, from deeper layers. Model and loop stay yours.

>>> import torch, snnfast
>>> from snnfast.distill import Distiller, LogitKD
>>> [name for name in ("FeatureKD", "TemporalSelfKD", "SpatialSelfKD") if name in __all__]
['FeatureKD', 'TemporalSelfKD', 'SpatialSelfKD']
"""

from .distiller import Distilled, Distiller, mean_over_time
from .losses import (
    ConfidenceKD,
    DistillationLoss,
    FeatureKD,
    LogitKD,
    PerStepKD,
    SpatialSelfKD,
    TemporalSelfKD,
    divergence,
)

__all__ = [
    "ConfidenceKD",
    "DistillationLoss",
    "Distilled",
    "Distiller",
    "FeatureKD",
    "LogitKD",
    "PerStepKD",
    "SpatialSelfKD",
    "TemporalSelfKD",
    "divergence",
    "mean_over_time",
]
