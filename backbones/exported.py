"""A backbone in a file that both this program and timm read: safetensors, named as timm names its weights."""

import json
import warnings
from pathlib import Path
from typing import Any

import fsspec
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor

from backbones import names
from backbones.build import create
from backbones.contract import Backbone


def dump(backbone: Backbone) -> bytes:
    """The file's content: weights, and as metadata the arguments of `create`."""
    weights = {_abroad(backbone, key): value.cpu().contiguous() for key, value in backbone.state_dict().items()}
    return safetensors.torch.save(weights, {"config": json.dumps(backbone.config)})


def load(path: str | Path) -> Backbone:
    """The backbone that a run exported: `path` is its run folder, or the `backbone.safetensors` in it; either may be an
    fsspec address.

    Raises ValueError where there is none, or the file is another program's.
    """
    file = str(path).rstrip("/") + ("" if str(path).endswith(".safetensors") else "/backbone.safetensors")
    try:
        with fsspec.open(file) as opened:
            content = opened.read()
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); a run exports its backbone when it ends.") from error
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        backbone, saved = create(**json.loads(header["__metadata__"]["config"])), safetensors.torch.load(content)
        backbone.load_state_dict(_at_home(backbone, saved))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: not a backbone that this program exported ({str(error)[:100]}).") from error
    return backbone.eval()


def in_timm(backbone: Backbone) -> str | None:
    """The call of timm that makes its network, ready for the exported weights; None where timm has none with these."""
    known, config = names.entry(backbone.name).timm, backbone.config
    if known is None:
        return None
    weights = {_abroad(backbone, k): v.shape for k, v in backbone.state_dict().items() if k != "mask_token"}
    plain: dict[str, Any] = {"num_classes": 0}
    if config["in_channels"] != 3:
        plain["in_chans"] = config["in_channels"]
    sized = plain | {"img_size": tuple(config["image_size"])}
    pooled = sized | {"global_pool": "avg", "fc_norm": False}
    for options in (plain, *([pooled] if backbone.pool == "mean" else []), sized):
        try:
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                theirs = timm.create_model(known, **options)
        except Exception:  # what a model refuses, and how, is its own; a run must not end with that
            continue
        shapes = {key: value.shape for key, value in theirs.state_dict().items()}
        if weights == shapes:
            given = "".join(f", {key}={value!r}" for key, value in options.items())
            return f"timm.create_model({known!r}{given})"
    return None


def _abroad(backbone: Backbone, key: str) -> str:
    """timm's name for a weight: the network's own, and for the norm of cells that of the layer it was."""
    part, _, rest = key.partition(".")
    if part == "network":
        return rest
    return f"{backbone.norm_key}.{rest}" if part == "norm" else key


def _at_home(backbone: Backbone, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's weights under the backbone's own names, which stand in files of earlier versions as they are."""
    if any(key.startswith("network.") for key in saved):
        return saved
    own = {_abroad(backbone, key): key for key in backbone.state_dict()}
    return {own.get(key, key): value for key, value in saved.items()}
