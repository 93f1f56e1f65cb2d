"""Parameters and multiply-adds against the papers."""

import pytest
import torch
from torch import nn

from backbones import cost, create
from backbones.build import published

# (name, pixels, millions of parameters, billions of multiply-adds, relative tolerance), as each paper prints them.
# Tolerances follow from the digits printed. Where no paper prints a figure it is None.
PAPERS = [
    # LeCun et al. 1998, section II.B: "60,000 trainable parameters"; connections 122,304 + 5,880 + 151,600 + 2,000 +
    # 48,120 + 10,164, of which 325,680 are multiply-adds of C1, C3, C5 and F6.
    ("lenet5", 32, 0.060, 0.000326, 0.001),
    # Krizhevsky et al. 2012, section 3.5: "60 million"; counted in Sze et al. 2017, table II: 61 M, 724 M.
    ("alexnet", 224, 60.97, 0.724, 0.001),
    # Simonyan & Zisserman 2015, table 2: 133, 133, 138, 144 M; Canziani et al. 2016: 15.5, 19.6 G.
    ("vgg11", 224, 133, 7.6, 0.004),
    ("vgg13", 224, 133, 11.3, 0.002),
    ("vgg16", 224, 138, 15.5, 0.004),
    ("vgg19", 224, 144, 19.6, 0.004),
    # With batch norm, as timm's model cards have them.
    ("vgg11_bn", 224, 132.9, 7.6, 0.004),
    ("vgg13_bn", 224, 133.1, 11.3, 0.004),
    ("vgg16_bn", 224, 138.4, 15.5, 0.004),
    # Szegedy et al. 2015, table 1: columns sum to 6.8 M and 1.5 G, each row rounded.
    ("googlenet", 224, 6.8, 1.5, 0.06),
    # He et al. 2016, table 1 gives multiply-adds; parameters as its authors' Caffe models have.
    ("resnet18", 224, 11.69, 1.8, 0.02),
    ("resnet34", 224, 21.80, 3.6, 0.02),
    ("resnet101", 224, 44.55, 7.6, 0.03),
    ("resnet152", 224, 60.19, 11.3, 0.02),
    # He et al. 2016, table 6: 0.27, 0.85, 1.7 M.
    ("resnet20", 32, 0.27, 0.0406, 0.003),
    ("resnet56", 32, 0.85, 0.1255, 0.004),
    ("resnet110", 32, 1.7, 0.2529, 0.02),
    ("plain20", 32, 0.27, 0.0406, 0.003),
    ("plain56", 32, 0.85, 0.1255, 0.004),
    ("plain110", 32, 1.7, 0.2529, 0.02),
    # Tan & Le 2019, table 2, each at its own resolution.
    ("efficientnet_b0", 224, 5.3, 0.39, 0.02),
    ("efficientnet_b1", 240, 7.8, 0.70, 0.02),
    ("efficientnet_b2", 260, 9.2, 1.0, 0.02),
    ("efficientnet_b3", 300, 12, 1.8, 0.03),
    ("efficientnet_b4", 380, 19, 4.2, 0.05),
    ("efficientnet_b5", 456, 30, 9.9, 0.04),
    ("efficientnet_b6", 528, 43, 19, 0.01),
    ("efficientnet_b7", 600, 66, 37, 0.03),
    # Liu et al. 2022, table 1.
    ("convnext_tiny", 224, 28.6, 4.5, 0.01),
    ("convnext_small", 224, 50, 8.7, 0.01),
    ("convnext_base", 224, 89, 15.4, 0.01),
    ("convnext_large", 224, 198, 34.4, 0.01),
    ("convnext_xlarge", 224, 350, 60.9, 0.01),
    # Touvron et al. 2021, table 1 and Steiner et al. 2022, table 2: parameters; multiply-adds with attention.
    ("vit_ti16", 224, 5.7, 1.25, 0.01),
    ("vit_s16", 224, 22, 4.6, 0.01),
    # Caron et al. 2021, table 1: 21 M without the classifier's 0.4. Multiply-adds by hand, of 785 tokens in 12 blocks:
    # 785 * 192 * 384 + 12 (12 * 785 * 384^2 + 2 * 785^2 * 384) + 384 * 1000.
    ("vit_s8", 224, 22.05, 22.4, 0.01),
    ("vit_b16", 224, 86.6, 17.56, 0.01),
    ("vit_l16", 224, 304.3, 61.6, 0.01),
    ("vit_h14", 224, 632, 167.3, 0.01),
]


@pytest.mark.parametrize(("name", "size", "millions", "billions", "tolerance"), PAPERS, ids=[p[0] for p in PAPERS])
def test_parameters_and_multiply_adds_match_the_paper(
    name: str, size: int, millions: float, billions: float, tolerance: float
) -> None:
    with torch.device("meta"):
        model = published(name)
    channels = 1 if name == "lenet5" else 3
    assert cost.parameters(model) / 1e6 == pytest.approx(millions, rel=tolerance)
    assert cost.multiply_adds(model, size, channels) / 1e9 == pytest.approx(billions, rel=tolerance)


def test_resnet50_matches_the_paper_once_its_stride_stands_where_the_paper_has_it() -> None:
    """timm, like everybody since 2016, puts the stride into the 3 x 3 convolution ("v1.5"): 4.1 instead of 3.8 G."""
    with torch.device("meta"):
        model = published("resnet50")
    assert cost.parameters(model) / 1e6 == pytest.approx(25.56, rel=1e-3)
    assert cost.multiply_adds(model, 224) / 1e9 == pytest.approx(4.09, rel=1e-3)
    for m in model.modules():
        if hasattr(m, "conv3") and m.conv2.stride == (2, 2):
            m.conv1.stride, m.conv2.stride = (2, 2), (1, 1)
    assert cost.multiply_adds(model, 224) / 1e9 == pytest.approx(3.8, rel=0.02)


def test_lenet5_has_exactly_the_sixty_thousand_parameters_of_its_paper() -> None:
    per_layer = {"C1": 156, "S2": 12, "C3": 1516, "S4": 32, "C5": 48120, "F6": 10164}
    assert cost.parameters(published("lenet5")) == sum(per_layer.values()) == 60000


@pytest.mark.parametrize(("name", "without"), [("alexnet", 58.63), ("googlenet", 1.025), ("vgg16", 123.64)])
def test_a_backbone_is_its_published_network_without_the_classifier(name: str, without: float) -> None:
    with torch.device("meta"):
        backbone, whole = create(name), published(name)
    assert cost.parameters(whole) - cost.parameters(backbone) == pytest.approx(without * 1e6, rel=1e-3)


def test_the_mask_token_does_not_count() -> None:
    backbone = create("vit_ti8", image_size=32)
    assert cost.parameters(backbone) == sum(p.numel() for p in backbone.parameters()) - backbone.width


@pytest.mark.parametrize("layers", [[(3, 1, 1)], [(3, 2, 1), (3, 1, 2)], [(5, 2, 1), (3, 2, 1), (3, 1, 1)]])
def test_receptive_field_is_what_the_gradient_reaches(layers: list[tuple[int, int, int]]) -> None:
    net = nn.Sequential()
    for kernel, stride, dilation in layers:
        net.append(nn.Conv2d(1, 1, kernel, stride, dilation * (kernel // 2), dilation))
        nn.init.ones_(net[-1].weight)
    net.append(nn.MaxPool2d(1))
    image = torch.zeros(1, 1, 64, 64, requires_grad=True)
    out = net(image)
    out[0, 0, out.shape[2] // 2, out.shape[3] // 2].backward()
    assert image.grad is not None
    rows = image.grad[0, 0].abs().sum(1).nonzero()
    assert cost.receptive_field(net, in_channels=1) == int(rows.max() - rows.min()) + 1


def test_receptive_field_of_a_backbone_is_what_perturbing_pixels_shows() -> None:
    backbone = create("resnet20", image_size=128).eval()
    image = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    cells = backbone.double()(image).cells
    cells[0, 16 * 32 + 16].sum().backward()
    assert image.grad is not None
    reached = image.grad[0].abs().sum((0, 1)).nonzero()
    seen = int(reached.max() - reached.min()) + 1
    field = cost.receptive_field(backbone)
    assert field == 81
    assert seen == field


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("lenet5", 32),
        ("alexnet", 163),
        ("vgg16", 196),
        ("resnet18", 435),
        ("resnet50", 427),
        ("vit_ti16", None),
        ("fc", None),
    ],
)
def test_receptive_fields_known_from_the_recursion(name: str, field: int | None) -> None:
    """VGG-16 to conv5_3: 196; ResNet-18: 435 (Araujo et al. 2019); AlexNet to conv5: 163; LeNet-5: all 32 pixels."""
    with torch.device("meta"):
        assert cost.receptive_field(create(name)) == field
