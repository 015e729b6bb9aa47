"""Networks for small images, written once as ANNs with ReLU and made spiking by :func:`snnfast.to_spiking`.

>>> from snnfast import models
>>> ann, snn = models.wrn16_2(), models.wrn16_2(timesteps=4)
>>> list(ann.state_dict()) == list(snn.state_dict())
True
"""

from .pyramidnet import pyramidnet18
from .resnet import resnet18, resnet19, sew_resnet18
from .vgg import vgg9, vgg11
from .wide_resnet import wrn16_2, wrn28_4

__all__ = ["pyramidnet18", "resnet18", "resnet19", "sew_resnet18", "vgg9", "vgg11", "wrn16_2", "wrn28_4"]
