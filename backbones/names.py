"""Which backbones exist and what they are called, answered without importing torch.

Short names stand in `SHORT`; `vit_<size><patch>` works for any patch size; every name timm registers is
known too, and works where the model gives one map of features (see `build.create`).
"""

import difflib
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple


class UnknownBackbone(ValueError):
    """A name that is neither one of ours nor one of timm's; the message lists the nearest names."""


class Entry(NamedTuple):
    """family: "cnn" or "vit"; timm: timm's name for it, None where we build it; paper: where it was published."""

    family: str
    timm: str | None
    paper: str


class VitSize(NamedTuple):
    """Width, blocks and attention heads of a vision transformer; timm: the word timm uses for this size."""

    width: int
    depth: int
    heads: int
    timm: str


# Ti and S: Touvron et al. 2021 (DeiT), table 1. B, L, H: Dosovitskiy et al. 2021, table 1.
VIT_SIZES = {
    "ti": VitSize(192, 12, 3, "tiny"),
    "s": VitSize(384, 12, 6, "small"),
    "b": VitSize(768, 12, 12, "base"),
    "l": VitSize(1024, 24, 16, "large"),
    "h": VitSize(1280, 32, 16, "huge"),
}
_VIT = re.compile(r"vit_(ti|s|b|l|h)([1-9]\d?)")
_CIFAR_NET = re.compile(r"(resnet|plain)(20|56|110)")
_VIT_LISTED = ("ti16", "ti8", "ti4", "s16", "s8", "s4", "b16", "b8", "l16", "h14")


def _vit(name: str) -> Entry:
    size, patch = _VIT.fullmatch(name).groups()  # type: ignore[union-attr]
    known = f"vit_{VIT_SIZES[size].timm}_patch{patch}_224"
    paper = "Touvron et al. 2021" if size in ("ti", "s") else "Dosovitskiy et al. 2021"
    return Entry("vit", known if known in timm_names() else None, paper)


def _short() -> dict[str, Entry]:
    table = {
        "fc": Entry("cnn", None, "one fully connected layer, the yardstick"),
        "lenet5": Entry("cnn", None, "LeCun et al. 1998"),
        "alexnet": Entry("cnn", None, "Krizhevsky et al. 2012"),
    }
    for depth in (11, 13, 16, 19):
        table[f"vgg{depth}"] = Entry("cnn", f"vgg{depth}", "Simonyan & Zisserman 2015")
        table[f"vgg{depth}_bn"] = Entry("cnn", f"vgg{depth}_bn", "Simonyan & Zisserman 2015, batch norm")
    table["googlenet"] = Entry("cnn", None, "Szegedy et al. 2015")
    table["googlenet_bn"] = Entry("cnn", None, "Szegedy et al. 2015, batch norm for LRN")
    for depth in (18, 34, 50, 101, 152):
        table[f"resnet{depth}"] = Entry("cnn", f"resnet{depth}", "He et al. 2016")
    for depth in (20, 56, 110):
        table[f"resnet{depth}"] = Entry("cnn", None, "He et al. 2016, section 4.2")
    for depth in (20, 56, 110):
        table[f"plain{depth}"] = Entry("cnn", None, "He et al. 2016, section 4.2, no shortcuts")
    for scale in range(8):
        table[f"efficientnet_b{scale}"] = Entry("cnn", f"efficientnet_b{scale}", "Tan & Le 2019")
    for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "xlarge"):
        table[f"convnext_{size}"] = Entry("cnn", f"convnext_{size}", "Liu et al. 2022")
    for vit in _VIT_LISTED:
        table[f"vit_{vit}"] = Entry("vit", None, "")
    return table


# timm's source files whose models mix positions by attention; all its other models are convolutional.
_TRANSFORMER_FILES = """
    beit cait coat convit crossvit davit deit efficientformer efficientformer_v2 efficientvit_mit efficientvit_msra
    eva gcvit gemma4_vit deepseek_vit qwen3_vit hiera hieradet_sam2 iformer levit maxxvit metaformer mlp_mixer
    mobilevit mvitv2 naflexvit nest nextvit pit pvt_v2 sequencer shvit swiftformer swin_transformer
    swin_transformer_v2 swin_transformer_v2_cr tiny_vit tnt twins visformer vision_transformer
    vision_transformer_hybrid vision_transformer_relpos vision_transformer_sam vitamin volo xcit
"""
_REGISTERED = re.compile(r"^@register_model\s*\n(?:@.*\n)*def (\w+)", re.MULTILINE)


@cache
def timm_names() -> dict[str, str]:
    """Every model name timm registers → the timm source file it stands in. Read from the sources: no import."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return {}
    files = sorted(Path(spec.submodule_search_locations[0], "models").glob("*.py"))
    return {name: f.stem for f in files for name in _REGISTERED.findall(f.read_text(encoding="utf-8"))}


SHORT: dict[str, Entry] = _short()


def vit_size(name: str) -> tuple[VitSize, int] | None:
    """(size, patch in pixels) of a `vit_<size><patch>` name, None for any other name."""
    match = _VIT.fullmatch(name)
    return (VIT_SIZES[match[1]], int(match[2])) if match else None


def patch(name: str) -> int | None:
    """Pixels along a side of the patches that a backbone cuts an image into, where its name tells; else None."""
    if vit := vit_size(name):
        return vit[1]
    match = re.search(r"_patch(\d+)", name)
    return int(match[1]) if match else None


def cifar_net(name: str) -> tuple[str, int] | None:
    """("resnet" or "plain", layers) of a net of He et al. 2016, section 4.2, None for any other name."""
    match = _CIFAR_NET.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def entry(name: str) -> Entry:
    """What is known about `name` (short or timm's). Raises UnknownBackbone."""
    if _VIT.fullmatch(name):
        return _vit(name)
    if name in SHORT:
        return SHORT[name]
    architecture = name.split(".")[0]  # timm writes pretrained weights as architecture.tag
    source = timm_names().get(architecture)
    if source is not None:
        return Entry("vit" if source in _TRANSFORMER_FILES.split() else "cnn", name, "timm")
    lower = {known.lower(): known for known in [*timm_names(), *SHORT]}
    near = difflib.get_close_matches(architecture.lower(), lower, n=5, cutoff=0.5)
    near.sort(key=lambda known: known not in SHORT)  # stable: ours first, then timm's, each by nearness
    hint = f"did you mean {', '.join(lower[n] for n in near)}?" if near else "no name is near it;"
    raise UnknownBackbone(f"backbone {name!r} is not known: {hint} `python -m backbones` lists all short names.")


def resolve(name: str) -> str:
    """The name itself when it is a backbone. Raises UnknownBackbone with the nearest names."""
    entry(name)
    return name


def family(name: str) -> str:
    """Which recipe suits it, "cnn" or "vit"; every model that mixes positions by attention is "vit"."""
    return entry(name).family
