import subprocess
import sys

import pytest

from backbones import UnknownBackbone, names


def test_short_names_resolve_and_have_a_family() -> None:
    assert {"fc", "lenet5", "alexnet", "googlenet", "vgg19_bn", "resnet110", "plain56", "efficientnet_b7"} <= set(
        names.SHORT
    )
    assert {"convnext_tiny", "vit_ti16", "vit_s16", "vit_s8", "vit_b16", "vit_l16", "vit_h14"} <= set(names.SHORT)
    for name in names.SHORT:
        assert names.resolve(name) == name
        assert names.family(name) == ("vit" if name.startswith("vit") else "cnn")


def test_vits_of_any_patch_size_are_known() -> None:
    assert names.family(names.resolve("vit_s2")) == "vit"
    size, patch = names.vit_size("vit_ti4") or (None, None)
    assert (size, patch) == (names.VIT_SIZES["ti"], 4)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("swin_tiny_patch4_window7_224", "vit"),
        ("vit_small_patch16_dinov3.lvd1689m", "vit"),
        ("deit_tiny_patch16_224", "vit"),
        ("densenet121", "cnn"),
        ("regnety_004", "cnn"),
    ],
)
def test_timm_names_have_a_family_too(name: str, family: str) -> None:
    assert names.family(name) == family


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("resnet5O", "resnet50"),
        ("ResNet18", "resnet18"),
        ("vit_s_16", "vit_s16"),
        ("lenet-5", "lenet5"),
        ("vit_x16", "vit_"),
    ],
)
def test_a_wrong_name_lists_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(UnknownBackbone, match=r"did you mean .*" + meant):
        names.resolve(wrong)


def test_a_name_near_nothing_still_gets_a_sentence() -> None:
    with pytest.raises(UnknownBackbone, match="'qqqqqqqqqq' is not known"):
        names.resolve("qqqqqqqqqq")


def test_names_and_help_need_no_torch() -> None:
    code = (
        "import sys, backbones, backbones.names as n, backbones.__main__\n"
        "n.resolve('vit_s16'); n.resolve('densenet121'); n.family('resnet50')\n"
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_table_shows_costs_and_says_what_does_not_fit() -> None:
    command = [sys.executable, "-m", "backbones", "--image-size", "32", "resnet18", "vit_ti4", "vit_h14"]
    shown = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout
    assert "resnet18" in shown
    assert "11.17 M" in shown
    assert "0.555 G" in shown
    assert "left out: image size 32 x 32 does not fit vit_h14" in shown


def test_the_table_refuses_a_wrong_name_in_one_line() -> None:
    command = [sys.executable, "-m", "backbones", "resnet5O"]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean" in done.stderr
    assert "resnet50" in done.stderr
    assert "Traceback" not in done.stderr
