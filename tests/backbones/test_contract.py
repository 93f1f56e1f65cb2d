"""What holds for every backbone alike."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from backbones import Backbone, Features, create
from backbones.cnn import FeatureMap

# One of each make: (name, image size, width, stride)
EVERY = [
    ("fc", 32, 512, 32),
    ("lenet5", 32, 120, 4),
    ("alexnet", 32, 256, 8),
    ("alexnet", 80, 256, 16),
    ("vgg11", 32, 512, 8),
    ("vgg11_bn", 96, 512, 16),
    ("googlenet", 32, 1024, 8),
    ("googlenet_bn", 96, 1024, 32),
    ("resnet18", 32, 512, 8),
    ("resnet18", 96, 512, 32),
    ("resnet50", 32, 2048, 8),
    ("resnet20", 32, 64, 4),
    ("plain20", 32, 64, 4),
    ("efficientnet_b0", 32, 1280, 8),
    ("efficientnet_b0", 96, 1280, 32),
    ("convnext_atto", 32, 320, 8),
    ("convnext_atto", 96, 320, 32),
    ("vit_ti16", 64, 192, 16),
    ("vit_ti4", 32, 192, 4),
    ("mobilenetv3_small_100", 96, 576, 32),
    ("regnety_004", 96, 440, 32),
    ("inception_v3", 96, 2048, 32),
    ("vit_tiny_patch16_224", 64, 192, 16),
    ("swin_tiny_patch4_window7_224", 224, 768, 32),
    ("mixer_s32_224", 224, 512, 32),
    ("coatnet_pico_rw_224", 224, 512, 32),
    ("poolformerv2_s12", 64, 512, 32),
    ("coat_lite_tiny", 224, 320, 32),
    ("mobilevitv2_050", 224, 256, 28),
]
IDS = [f"{e[0]}-{e[1]}" for e in EVERY]


@pytest.mark.parametrize(("name", "size", "width", "stride"), EVERY, ids=IDS)
def test_shapes_strides_and_gradients(name: str, size: int, width: int, stride: int) -> None:
    backbone = create(name, image_size=size)
    h, w = backbone.grid(size, size)
    images = torch.randn(2, 3, size, size)
    features = backbone(images, layers=True)
    assert (backbone.name, backbone.width, backbone.stride, backbone.in_channels) == (name, width, stride, 3)
    assert features.pooled.shape == (2, width)
    assert features.cells.shape == (2, h * w, width)
    assert (h * stride, w * stride) == (size, size)
    assert features.layers
    assert all(layer.ndim == 3 and len(layer) == 2 for layer in features.layers)

    direction = torch.randn(width)
    used = features.pooled if backbone.pool == "cls" else features.cells  # either alone must reach every parameter
    (used * direction).square().sum().backward()
    for key, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        assert parameter.requires_grad == (key != "mask_token"), key

    keep = torch.arange(0, h * w, 2).expand(2, -1)
    with torch.no_grad():
        some = backbone(images, visible=keep)
    assert some.cells.shape == (2, keep.shape[1], width)
    assert some.layers == ()


@pytest.mark.parametrize("channels", [1, 4, 12])
@pytest.mark.parametrize(
    "name", ["fc", "lenet5", "alexnet", "vgg11", "googlenet", "resnet18", "efficientnet_b0", "convnext_atto", "vit_ti8"]
)
def test_any_number_of_channels_and_images_that_are_not_square(name: str, channels: int) -> None:
    backbone = create(name, image_size=(32, 64), in_channels=channels).eval()
    h, w = backbone.grid(32, 64)
    images = torch.randn(2, channels, 32, 64)
    with torch.no_grad():
        assert backbone(images).cells.shape == (2, h * w, backbone.width)
        assert backbone(images, visible=torch.zeros(2, 1, dtype=torch.int64)).cells.shape == (2, 1, backbone.width)
    with pytest.raises(ValueError, match=f"takes images .*in_channels={channels + 1}"):
        backbone(torch.randn(2, channels + 1, 32, 64))


@pytest.mark.parametrize(
    "name", ["fc", "lenet5", "resnet18", "efficientnet_b0", "convnext_atto", "vit_ti8", "alexnet", "vgg11_bn"]
)
def test_config_and_state_make_it_again(name: str) -> None:
    backbone = create(
        name, image_size=32, in_channels=2, drop_path=0.1 if name in ("resnet18", "vit_ti8") else 0.0
    ).eval()
    again = create(**backbone.config).eval()
    again.load_state_dict(backbone.state_dict())
    images = torch.randn(2, 2, 32, 32)
    with torch.no_grad():
        for a, b in zip(backbone(images, layers=True).layers, again(images, layers=True).layers):
            assert torch.equal(a, b)
        assert torch.equal(backbone(images).pooled, again(images).pooled)
    assert again.config == backbone.config
    assert pickle.loads(pickle.dumps(backbone.config)) == backbone.config


def test_a_config_holds_what_auto_meant() -> None:
    assert create("resnet18", image_size=64).config["stem"] == "small"
    assert create("resnet18", image_size=(65, 80)).config["stem"] == "imagenet"
    assert create("resnet18", image_size=32, stem="imagenet").stride == 32
    assert create("resnet18", image_size=224, stem="small").stride == 8
    assert create("vit_ti8", image_size=32).config["stem"] == "auto"


@pytest.mark.parametrize("name", ["fc", "resnet18", "googlenet", "vit_ti8"])
def test_a_deepcopy_is_another_network(name: str) -> None:
    student = create(name, image_size=32).eval()
    teacher = copy.deepcopy(student)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(student(images).pooled, teacher(images).pooled)
        for p in student.parameters():
            p.add_(0.1)
        changed, kept = student(images).pooled, teacher(images).pooled
    assert not torch.allclose(changed, kept)
    assert not {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}


@pytest.mark.parametrize("name", ["lenet5", "resnet18", "convnext_atto", "fc"])
def test_replaced_cells_of_a_cnn_show_one_learned_colour(name: str) -> None:
    backbone = create(name, image_size=32).eval()
    h, w = backbone.grid(32, 32)
    images, replaced = torch.randn(2, 3, 32, 32), torch.zeros(2, h * w, dtype=torch.bool)
    replaced[:, ::2] = True
    nn.init.normal_(backbone.mask_token)
    pixels = nn.functional.interpolate(replaced.float().view(2, 1, h, w), size=(32, 32)) > 0
    coloured = torch.where(pixels, backbone.mask_token.view(1, 3, 1, 1), images)
    with torch.no_grad():
        assert torch.equal(backbone(images, replaced=replaced).cells, backbone(coloured).cells)


@pytest.mark.parametrize("name", ["resnet18", "vit_ti8"])
def test_the_mask_token_learns_once_asked_to(name: str) -> None:
    backbone = create(name, image_size=32)
    images, replaced = torch.randn(2, 3, 32, 32), torch.arange(16).repeat(2, 1) % 2 == 0
    with pytest.raises(ValueError, match=r"call backbone\.learn_mask_token"):
        backbone(images, replaced=replaced)
    backbone.learn_mask_token()
    (backbone(images, replaced=replaced).cells * torch.randn(backbone.width)).square().sum().backward()
    assert backbone.mask_token.grad is not None
    assert backbone.mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "size", "wrong"),
    [("resnet18", 224, (100, 224)), ("vit_ti16", 64, (64, 70)), ("lenet5", 32, (30, 30)), ("resnet18", 224, (16, 16))],
)
def test_a_size_that_does_not_fit_is_refused_in_a_sentence(name: str, size: int, wrong: tuple[int, int]) -> None:
    backbone = create(name, image_size=size)
    sentence = rf"image size {wrong[0]} x {wrong[1]} does not fit {name}: .*multiples of its stride {backbone.stride}; "
    with pytest.raises(ValueError, match=sentence + r"the nearest size is \d+ x \d+"):
        backbone(torch.randn(1, 3, *wrong))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "resnet18", "stem": "tiny"}, "stem='tiny' is none of"),
        ({"name": "resnet18", "pool": "max"}, "pool='max' is none of"),
        ({"name": "resnet18", "pool": "cls"}, "resnet18 has no class token"),
        ({"name": "fc", "pool": "cls"}, "fc has no class token"),
        ({"name": "vit_base_patch16_siglip_224", "pool": "cls"}, "has no class token"),
        ({"name": "vit_ti8", "stem": "small"}, "vit_ti8 has one stem only"),
        ({"name": "regnety_004", "stem": "small"}, "regnety_004 has one stem only"),
        ({"name": "resnet20", "stem": "imagenet"}, "resnet20 has one stem only"),
        ({"name": "vit_ti16", "image_size": 100}, "100 x 100 does not fit vit_ti16"),
        ({"name": "lenet5", "drop_path": 0.1}, "lenet5 has no residual blocks"),
        ({"name": "vgg11", "drop_path": 0.1}, "vgg11 has no blocks that can be dropped"),
        ({"name": "lenet5", "pretrained": True}, "timm has no weights for lenet5"),
        ({"name": "resnet18", "in_channels": 0}, "must be at least 1"),
        ({"name": "resnet19x"}, "did you mean resnet1"),
        ({"name": "coat_tiny"}, "coat_tiny cannot be a backbone: timm gives 3 tensors as its features"),
        ({"name": "efficientvim_m1"}, "efficientvim_m1 cannot be a backbone: timm gives 4 tensors"),
        ({"name": "crossvit_tiny_240", "image_size": 240}, "timm gives 2 tensors as its features, not one map"),
        ({"name": "pit_ti_224"}, "pit_ti_224 cannot be a backbone: timm gives class tokens alone"),
        ({"name": "test_maxvit", "image_size": 100}, "test_maxvit takes no images of 100 x 100 pixels"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_a_sentence(options: dict, sentence: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=sentence):
        create(**options)


def test_wrong_cells_are_refused_in_a_sentence() -> None:
    backbone = create("lenet5", image_size=32)
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="visible must be int64 cell indices"):
        backbone(images, visible=torch.ones(2, 64, dtype=torch.bool))
    with pytest.raises(ValueError, match="replaced must be a bool mask"):
        backbone(images, replaced=torch.ones(2, 16, dtype=torch.bool))


def test_a_network_of_one_size_says_so() -> None:
    backbone = create("mixer_s32_224", image_size=224)
    with pytest.raises(ValueError, match=r"works at 224 x 224 pixels only.*image_size=\(256, 256\)"):
        backbone(torch.randn(1, 3, 256, 256))


def test_windows_that_fit_one_size_are_found_out() -> None:
    """Its windows of 8 x 8 cells of stride 4 fit 256 and 512 pixels, but not what lies between."""
    with torch.device("meta"):
        backbone = create("test_maxvit", image_size=256)
    with pytest.raises(ValueError, match="works at 256 x 256 pixels only"):
        backbone.grid(96, 96)


def test_tokens_before_the_cells_are_left_out() -> None:
    """VOLO has a class token that timm does not count as a prefix."""
    backbone = create("volo_d1_224").eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = backbone.network.forward_features(images)  # type: ignore[union-attr, operator]
        assert torch.equal(backbone(images).cells, tokens[:, 1:])


def test_fc_takes_other_sizes_by_resizing() -> None:
    backbone = create("fc", image_size=32).eval()
    with torch.no_grad():
        assert backbone(torch.randn(2, 3, 16, 24)).cells.shape == (2, 1, 512)
        flat = torch.full((1, 3, 64, 64), 0.5)
        torch.testing.assert_close(backbone(flat).pooled, backbone(flat[..., :32, :32]).pooled, rtol=1e-4, atol=1e-4)


def test_pooling_over_cells_can_be_asked_of_a_vit() -> None:
    features = create("vit_ti8", image_size=32, pool="mean").eval()(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(features.pooled, features.cells.mean(1))


def test_no_backbone_carries_a_classifier() -> None:
    for name in ("vgg11", "alexnet", "mobilenetv3_small_100", "convnext_atto"):
        with torch.device("meta"):
            backbone = create(name)
        assert not [k for k, _ in backbone.named_parameters() if "head" in k or "classifier" in k or "pre_logits" in k]


def test_the_stages_of_lenet_are_those_of_the_paper() -> None:
    """At 32 px without padding: 14 x 14, 5 x 5, 1 x 1; C3's maps see the maps of S2 that table I lists."""
    from backbones.build import published
    from backbones.classics import C3_SEES

    _, maps = published("lenet5").forward_intermediates(torch.randn(1, 1, 32, 32))  # type: ignore[operator]
    assert [tuple(m.shape[1:]) for m in maps] == [(6, 14, 14), (16, 5, 5), (120, 1, 1)]
    assert sum(len(s) for s in C3_SEES) == 60
    padded = create("lenet5", image_size=32, in_channels=1)
    assert isinstance(padded, FeatureMap)
    features = padded(torch.randn(1, 1, 32, 32), layers=True)
    assert [layer.shape[1] for layer in features.layers] == [256, 64, 64]


def test_plain_networks_are_their_twins_without_the_shortcut() -> None:
    residual, plain = create("resnet20", image_size=32).eval(), create("plain20", image_size=32).eval()
    plain.load_state_dict(residual.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(residual(images).cells, plain(images).cells)


def test_the_result_is_a_named_tuple_whatever_the_make() -> None:
    def mean_of(backbone: Backbone) -> Tensor:
        features = backbone(torch.randn(1, 3, 32, 32))
        assert isinstance(features, Features)
        return features.pooled.mean()

    assert mean_of(create("fc", image_size=32)).ndim == mean_of(create("vit_ti8", image_size=32)).ndim == 0


@pytest.mark.parametrize(
    ("name", "count", "deepest"),
    [
        ("lenet5", 5, "network.stages.2.0.weight"),
        ("resnet18", 9, "network.layer4.1.bn2.weight"),
        ("efficientnet_b0", 17, "network.bn2.weight"),
        ("convnext_atto", 14, "norm.weight"),
        ("vit_ti8", 14, "norm.weight"),
        ("poolformerv2_s12", 17, "norm.weight"),
        ("csatv2", 26, "norm.weight"),
    ],
)
def test_depths_rise_from_the_stem_to_the_last_norm(name: str, count: int, deepest: str) -> None:
    backbone = create(name, image_size=64)
    depths = backbone.depths()
    assert set(depths) == {key for key, _ in backbone.named_parameters()}
    assert sorted(set(depths.values())) == list(range(count))
    assert depths[deepest] == count - 1
    assert len(backbone.blocks()) == (count - 2 if name == "vit_ti8" else count)
    stem = {
        "lenet5": "stages.0.0", "resnet18": "conv1", "vit_ti8": "patch_embed.proj", "poolformerv2_s12": "stem.conv"
    }.get(name)  # fmt: skip
    assert depths["mask_token"] == 0
    assert stem is None or depths[f"network.{stem}.weight"] == 0
