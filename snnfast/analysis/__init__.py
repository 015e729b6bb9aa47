"""What a network costs and how it behaves: synaptic operations, memory, firing rates, robustness, plots.

>>> import torch, snnfast
>>> from snnfast import analysis
>>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), snnfast.LIFNode(step_mode="m"), torch.nn.Linear(4, 2))
>>> report = analysis.count_synops(net, torch.rand(16, 2, 8))
>>> report.macs
512.0
"""

from .corruptions import CORRUPTIONS, LEVELS
from .memory import ParameterTable, parameter_table, saved_bytes
from .plots import plot_accuracy, plot_firing_rates, plot_raster, plot_robustness
from .rates import FiringRateMonitor, FiringRateRegulariser
from .robustness import RobustnessReport, robustness, wilson_interval
from .synops import LayerSynops, SynopsReport, count_synops

__all__ = [
    "CORRUPTIONS",
    "LEVELS",
    "FiringRateMonitor",
    "FiringRateRegulariser",
    "LayerSynops",
    "ParameterTable",
    "RobustnessReport",
    "SynopsReport",
    "count_synops",
    "parameter_table",
    "plot_accuracy",
    "plot_firing_rates",
    "plot_raster",
    "plot_robustness",
    "robustness",
    "saved_bytes",
    "wilson_interval",
]
