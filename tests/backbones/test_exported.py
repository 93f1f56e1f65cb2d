"""An exported backbone: what is loaded equals what was written, here and in timm; what is no such file is refused."""

import json

import fsspec
import pytest
import safetensors.torch
import torch
from einops import rearrange

import backbones
from backbones import exported

KINDS = [
    ("vit_ti16", {"image_size": 64}),
    ("vit_ti16", {"image_size": 64, "pool": "mean"}),
    ("vit_ti16", {"image_size": 64, "in_channels": 1}),
    ("vit_ti8", {"image_size": 32}),
    ("deit3_small_patch16_224", {"image_size": 64}),
    ("resnet18", {"image_size": 96}),
    ("resnet18", {"image_size": 32}),
    ("efficientnet_b0", {"image_size": 96}),
    ("convnext_atto", {"image_size": 96}),
    ("vgg11_bn", {"image_size": 96}),
    ("lenet5", {"image_size": 32}),
    ("fc", {"image_size": 16}),
]
NOT_IN_TIMM = {("vit_ti8", 32), ("resnet18", 32), ("vgg11_bn", 96), ("lenet5", 32), ("fc", 16)}
"""Names timm lacks, small stems, and VGG, whose fully connected layers a backbone has not."""


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_it_comes_back_here_and_in_timm(name, options, tmp_path):
    torch.manual_seed(0)
    backbone = backbones.create(name, **options).eval()
    file = tmp_path / "backbone.safetensors"
    file.write_bytes(exported.dump(backbone))
    images = torch.randn(2, backbone.in_channels, options["image_size"], options["image_size"])
    with torch.no_grad():
        ours = backbone(images)
        for place in (tmp_path, file, f"file://{tmp_path}"):
            assert torch.equal(backbones.load(place)(images).cells, ours.cells)
        line = exported.in_timm(backbone)
        assert (line is None) == ((name, options["image_size"]) in NOT_IN_TIMM)
        if line is None:
            return
        import timm

        model = eval(line, {"timm": timm}).eval()
        missing, unexpected = model.load_state_dict(safetensors.torch.load_file(file), strict=False)
        assert (missing, unexpected) == ([], ["mask_token"])
        if name == "convnext_atto":  # timm norms the pooled feature, a backbone each cell
            cells = model.head.norm(model.forward_features(images))
            torch.testing.assert_close(rearrange(cells, "b d h w -> b (h w) d"), ours.cells)
        else:
            torch.testing.assert_close(model(images), ours.pooled)


def test_files_of_earlier_versions_are_read(tmp_path):
    backbone = backbones.create("lenet5", image_size=32)
    state = {key: value.contiguous() for key, value in backbone.state_dict().items()}
    assert any(key.startswith("network.") for key in state)
    path = tmp_path / "backbone.safetensors"
    path.write_bytes(safetensors.torch.save(state, {"config": json.dumps(backbone.config)}))
    assert all(torch.equal(value, state[key]) for key, value in backbones.load(path).state_dict().items())


def test_it_is_read_at_any_address():
    backbone = backbones.create("lenet5", image_size=32)
    with fsspec.open("memory://runs/a/backbone.safetensors", "wb") as file:
        file.write(exported.dump(backbone))
    assert backbones.load("memory://runs/a").name == "lenet5"


def test_what_is_no_backbone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a run exports its backbone when it ends"):
        backbones.load(tmp_path)
    whole = exported.dump(backbones.create("lenet5", image_size=32))
    for content in (b"", b"not safetensors", whole[:-9], safetensors.torch.save({"a": torch.zeros(1)})):
        (tmp_path / "backbone.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="not a backbone that this program exported"):
            backbones.load(tmp_path)
