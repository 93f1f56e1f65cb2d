"""Real backbones, tiny: a ViT and a staged CNN of the contract."""

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from backbones.classics import Staged
from backbones.cnn import FeatureMap
from backbones.contract import Backbone
from backbones.vit import Transformer


def tiny_vit(
    in_channels: int = 3, patch: int = 8, width: int = 32, depth: int = 2, image_size: int | tuple[int, int] = 32
) -> Backbone:
    """Patches of 8 pixels, 32 wide, two blocks, a class token, mean pooling."""
    network = VisionTransformer(
        image_size, patch, in_channels, num_classes=0, embed_dim=width, depth=depth, num_heads=4
    )
    return Transformer("tiny_vit", network, in_channels=in_channels, pool="mean", config={})


def tiny_cnn(in_channels: int = 3) -> Backbone:
    """Cells of 8 pixels; maps of 4 times, twice, once and once the grid; 8, 16, 32 and 32 wide."""

    def stage(n_in: int, n_out: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU())

    widths = (in_channels, 8, 16, 32, 32)
    network = Staged([stage(a, b, s) for a, b, s in zip(widths, widths[1:], (2, 2, 2, 1))], 32)
    return FeatureMap("tiny_cnn", network, width=32, stride=8, in_channels=in_channels, config={})


TINY = {"vit": tiny_vit, "cnn": tiny_cnn}
