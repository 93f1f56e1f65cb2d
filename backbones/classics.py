"""The networks timm does not have: LeNet-5, AlexNet, GoogLeNet, the CIFAR ResNets and their skip-free twins.

Each is a list of stages; the last stage's output is the feature map. Two ways to build each:
- for features (default): borders padded so that a map has exactly H / stride x W / stride cells, no classifier;
- `as_published=True`: the paper's own borders and its classifier, which is what its parameter count counts.
"""

import math

import torch
from torch import Tensor, nn


class Staged(nn.Module):
    """A feature extractor made of stages: images [B, C, H, W] → map [B, num_features, h, w]."""

    def __init__(self, stages: list[nn.Module], num_features: int, classifier: nn.Module | None = None) -> None:
        super().__init__()
        self.stages = nn.Sequential(*stages)
        self.num_features = num_features
        self.classifier = classifier

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stages(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's description of depth: one number a stage, or a module within it."""
        return {"stem": r"^$", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)(?:\.(\d+))?"}

    def forward_intermediates(self, x: Tensor, output_fmt: str = "NCHW") -> tuple[Tensor, list[Tensor]]:
        """The last map, and the map after every stage."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return x, maps

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return x if self.classifier is None else self.classifier(x)


def kaiming_(network: nn.Module, mode: str = "fan_in") -> None:
    """Normal weights of variance 2 / fan, zero biases (He et al. 2015, equations 10 and 14)."""
    for m in network.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight, mode=mode, nonlinearity="relu")  # type: ignore[arg-type]
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# LeNet-5: LeCun, Bottou, Bengio, Haffner 1998, "Gradient-Based Learning Applied to Document Recognition", section II.B.

# Table I: which maps of S2 each of the 16 maps of C3 sees.
C3_SEES = (
    *((i, (i + 1) % 6, (i + 2) % 6) for i in range(6)),
    *((i, (i + 1) % 6, (i + 2) % 6, (i + 3) % 6) for i in range(6)),
    *((0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5)),
    (0, 1, 2, 3, 4, 5),
)


class ScaledTanh(nn.Module):
    """1.7159 tanh(2 a / 3): equation 6 with the constants of appendix A."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(x * (2 / 3))


class Subsampling(nn.Module):
    """Mean over 2 x 2, times a learned coefficient, plus a learned bias, per map (layers S2 and S4)."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.mean = nn.AvgPool2d(2)
        self.coefficient = nn.Parameter(torch.ones(maps))
        self.bias = nn.Parameter(torch.zeros(maps))

    def forward(self, x: Tensor) -> Tensor:
        return self.mean(x) * self.coefficient.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class TableConv2d(nn.Module):
    """A convolution whose output maps each see their own subset of input maps (layer C3). Maps with equally many inputs
    run as one grouped convolution, so parameters and multiply-adds are those of the table and no more."""

    def __init__(self, sees: tuple[tuple[int, ...], ...], kernel: int, padding: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        for fan in sorted({len(s) for s in sees}):
            maps = [s for s in sees if len(s) == fan]
            conv = nn.Conv2d(fan * len(maps), len(maps), kernel, padding=padding, groups=len(maps))
            conv.register_buffer("sees", torch.tensor([i for s in maps for i in s]), persistent=False)
            self.convolutions.append(conv)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x.index_select(1, conv.sees)) for conv in self.convolutions], dim=1)  # type: ignore[arg-type]


def lenet5(in_channels: int = 3, as_published: bool = False) -> Staged:
    """C1 6@5x5, S2, C3 16@5x5 (table I), S4, C5 120@5x5; stride 4.

    For features every convolution is padded by 2, so that H x W gives H/4 x W/4 cells of C5. As published (32 px, one
    channel) C5 is 1 x 1 and F6 follows: 60,000 trainable parameters; the output's fixed RBF units have none.
    """
    pad = 0 if as_published else 2
    net = Staged(
        [
            nn.Sequential(nn.Conv2d(in_channels, 6, 5, padding=pad), ScaledTanh(), Subsampling(6), ScaledTanh()),
            nn.Sequential(TableConv2d(C3_SEES, 5, pad), ScaledTanh(), Subsampling(16), ScaledTanh()),
            nn.Sequential(nn.Conv2d(16, 120, 5, padding=pad), ScaledTanh()),
        ],
        120,
        nn.Sequential(nn.Flatten(), nn.Linear(120, 84), ScaledTanh()) if as_published else None,
    )
    for m in net.modules():  # appendix A: uniform within 2.4 / fan-in
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            bound = 2.4 / m.weight[0].numel()
            nn.init.uniform_(m.weight, -bound, bound)
            if m.bias is not None:
                nn.init.uniform_(m.bias, -bound, bound)
    return net


# AlexNet: Krizhevsky, Sutskever, Hinton 2012, section 3.


def alexnet(in_channels: int = 3, small: bool = False, as_published: bool = False) -> Staged:
    """Five convolutions, LRN after the first two, the second, fourth and fifth in two groups; stride 16, or 8 with the
    small stem (3 x 3, stride 2, for 11 x 11, stride 4). Features are conv5 after its ReLU; pool5 is the classifier's.

    Weights start as in He et al. 2015, not as the paper's N(0, 0.01²), under which the signal fades layer by layer.
    """
    if small:
        conv1 = nn.Conv2d(in_channels, 96, 3, stride=2, padding=1)
    else:  # padding 2: 224 → 55, as in the paper; padding 4: 224 → 56 = 4 x 14
        conv1 = nn.Conv2d(in_channels, 96, 11, stride=4, padding=2 if as_published else 4)

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, 0 if as_published else 1)

    def lrn() -> nn.Module:  # section 3.3: k = 2, n = 5, α = 1e-4 per neighbour (torch divides by n), β = 0.75
        return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)

    def relu() -> nn.Module:
        return nn.ReLU(inplace=True)

    classifier = nn.Sequential(
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        *(nn.Dropout(), nn.Linear(256 * 6 * 6, 4096), relu()),
        *(nn.Dropout(), nn.Linear(4096, 4096), relu(), nn.Linear(4096, 1000)),
    )
    net = Staged(
        [
            nn.Sequential(conv1, relu(), lrn(), pool()),
            nn.Sequential(nn.Conv2d(96, 256, 5, padding=2, groups=2), relu(), lrn(), pool()),
            nn.Sequential(nn.Conv2d(256, 384, 3, padding=1), relu()),
            nn.Sequential(nn.Conv2d(384, 384, 3, padding=1, groups=2), relu()),
            nn.Sequential(nn.Conv2d(384, 256, 3, padding=1, groups=2), relu()),
        ],
        256,
        classifier if as_published else None,
    )
    kaiming_(net)
    return net


# GoogLeNet: Szegedy et al. 2015, "Going Deeper with Convolutions", table 1.


class ConvRelu(nn.Sequential):
    """Convolution, [batch norm,] ReLU."""

    def __init__(self, inputs: int, maps: int, kernel: int, stride: int = 1, batch_norm: bool = False) -> None:
        conv = nn.Conv2d(inputs, maps, kernel, stride, kernel // 2, bias=not batch_norm)
        norm = [nn.BatchNorm2d(maps)] if batch_norm else []
        super().__init__(conv, *norm, nn.ReLU(inplace=True))


class Inception(nn.Module):
    """Figure 2(b): 1 x 1, reduced 3 x 3, reduced 5 x 5 and pooled 1 x 1 branches, concatenated."""

    def __init__(self, inputs: int, maps: tuple[int, int, int, int, int, int], batch_norm: bool) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = maps

        def conv(a: int, b: int, kernel: int) -> nn.Module:
            return ConvRelu(a, b, kernel, batch_norm=batch_norm)

        self.one = conv(inputs, one, 1)
        self.three = nn.Sequential(conv(inputs, reduce3, 1), conv(reduce3, three, 3))
        self.five = nn.Sequential(conv(inputs, reduce5, 1), conv(reduce5, five, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(inputs, pooled, 1))
        self.maps = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], dim=1)


INCEPTIONS = {  # table 1: #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj
    "3": ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    "4": (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    "5": ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
}


def googlenet(
    in_channels: int = 3, small: bool = False, as_published: bool = False, batch_norm: bool = False
) -> Staged:
    """22 layers in nine inception modules; stride 32, or 8 with the small stem (3 x 3, stride 1, no first pooling).

    As in the paper: LRN twice in the stem, no batch norm, 6,998,552 parameters with the classifier and without the two
    auxiliary ones. `batch_norm` puts one after every convolution and drops LRN (Ioffe & Szegedy 2015, section 4.2).
    Weights start as in He et al. 2015; the paper does not say.
    """

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    def lrn() -> nn.Module:  # the authors' DistBelief constants are unpublished: those of Caffe's replication
        return nn.Identity() if batch_norm else nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)

    def conv(inputs: int, maps: int, kernel: int, stride: int = 1) -> nn.Module:
        return ConvRelu(inputs, maps, kernel, stride, batch_norm)

    first = conv(in_channels, 64, 3) if small else conv(in_channels, 64, 7, 2)
    stages: list[nn.Module] = [
        nn.Sequential(first, nn.Identity() if small else pool(), lrn()),
        nn.Sequential(conv(64, 64, 1), conv(64, 192, 3), lrn()),
    ]
    width = 192
    for rows in INCEPTIONS.values():
        modules: list[nn.Module] = [pool()]
        for row in rows:
            modules.append(Inception(width, row, batch_norm))
            width = modules[-1].maps  # type: ignore[assignment]
        stages.append(nn.Sequential(*modules))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.4), nn.Linear(width, 1000))
    net = Staged(stages, width, head if as_published else None)
    kaiming_(net)
    return net


# CIFAR ResNets: He et al. 2016, "Deep Residual Learning", section 4.2.


class CifarBlock(nn.Module):
    """Two 3 x 3 convolutions. The shortcut is the identity, subsampled and zero-padded where the shape changes (option
    A, no parameters), or absent in a plain network."""

    def __init__(self, inputs: int, maps: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, maps, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(maps)
        self.conv2 = nn.Conv2d(maps, maps, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(maps)
        self.stride, self.extra, self.shortcut = stride, maps - inputs, shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut:
            x = x[:, :, :: self.stride, :: self.stride]
            if self.extra:
                x = torch.cat([x, x.new_zeros(x.shape[0], self.extra, *x.shape[2:])], dim=1)
            out = out + x
        return torch.relu(out)


def cifar_resnet(depth: int, in_channels: int = 3, shortcuts: bool = True, as_published: bool = False) -> Staged:
    """6 n + 2 layers in three stages of 16, 32, 64 maps; stride 4; its own 3 x 3 stem. Init as in He et al. 2015."""
    stem = nn.Sequential(nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    stages: list[nn.Module] = [stem]
    inputs = 16
    for maps in (16, 32, 64):
        blocks = []
        for i in range((depth - 2) // 6):
            blocks.append(CifarBlock(inputs, maps, 2 if i == 0 and maps > 16 else 1, shortcuts))
            inputs = maps
        stages.append(nn.Sequential(*blocks))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    net = Staged(stages, 64, head if as_published else None)
    kaiming_(net, mode="fan_out")
    return net


def fc_width(height: int, width: int, in_channels: int) -> int:
    """Outputs of the fully connected layer: 512, fewer where an image has fewer numbers."""
    return min(512, math.prod((height, width, in_channels)))
