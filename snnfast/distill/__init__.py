"""Training by distillation: from a teacher, from more time steps, from deeper layers. Model and loop stay yours.

>>> import torch, snnfast
>>> from snnfast.distill import Distiller, LogitKD
>>> student, teacher = snnfast.models.wrn16_2(timesteps=2, width=2), snnfast.models.wrn16_2(width=2)
>>> distiller = Distiller(student, teacher, [LogitKD(weight=0.5)], task_weight=0.5)
>>> result = distiller(torch.rand(2, 3, 16, 16), torch.tensor([3, 1]))
>>> result.loss.backward(); list(result.terms)
['task', 'logit_kd']
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
