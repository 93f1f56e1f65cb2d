"""Small stems: what an ImageNet network's first layers become for images of 64 pixels and less.

The rule is that of SimCLR's ResNets for CIFAR (Chen et al. 2020, appendix B.9): drop the first factor 4 of the stride,
so that the whole network has stride 8 and a 32-pixel image 4 x 4 cells. At the same image size it costs up to 16 times
as much.
"""

from typing import Any

from timm.layers import trunc_normal_
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import ResNet
from timm.models.vgg import VGG
from torch import nn

SMALL_UP_TO = 64  # pixels of the shorter side: where stem="auto" means "small"


def has_small_stem(network: nn.Module) -> bool:
    """Whether `make_stem_small` knows how to reduce this network's stem."""
    if isinstance(network, ConvNeXt):
        return isinstance(network.stem[0], nn.Conv2d) and network.stem[0].stride == network.stem[0].kernel_size
    return isinstance(network, (ResNet, EfficientNet, MobileNetV3, VGG, DenseNet))


def make_stem_small(network: Any) -> None:
    """Reduce the stem of a timm network in place; new kernels start as the network's own do."""
    if isinstance(network, ResNet):
        deep = isinstance(network.conv1, nn.Sequential)
        if deep:
            network.conv1[0].stride = (1, 1)
        else:
            network.conv1 = _conv3x3(network.conv1)
        network.maxpool = nn.Identity()
    elif isinstance(network, DenseNet):
        if hasattr(network.features, "conv0"):
            network.features.conv0 = _conv3x3(network.features.conv0)
        network.features.pool0 = nn.Identity()
    elif isinstance(network, VGG):  # its stem keeps full resolution; the first pooling is what can go
        first = next(i for i, m in enumerate(network.features) if isinstance(m, nn.MaxPool2d))
        network.features[first] = nn.Identity()
    elif isinstance(network, ConvNeXt):  # the 4 x 4 patchifying convolution
        old = network.stem[0]
        network.stem[0] = nn.Conv2d(old.in_channels, old.out_channels, 3, 1, 1, bias=old.bias is not None)
        trunc_normal_(network.stem[0].weight, std=0.02)
        nn.init.zeros_(network.stem[0].bias)
    else:  # EfficientNet, MobileNetV3: the stem and the first depthwise convolution that subsample
        network.conv_stem.stride = (1, 1)
        strided = (m for m in network.blocks.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2))
        next(strided).stride = (1, 1)


def _conv3x3(old: nn.Conv2d) -> nn.Conv2d:
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, 1, 1, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    return new
