"""The small backbone of `objective_toys` with all of the contract: `replaced`, a mask token, depths."""

import torch
import torch.nn.functional as F
from objective_toys import Features, ToyBackbone
from torch import Tensor, nn


class MaskedToy(ToyBackbone):
    """Replaced cells are embedded as the mask token; any number of channels."""

    def __init__(self, width: int = 32, in_channels: int = 3) -> None:
        super().__init__(width)
        self.in_channels = in_channels
        self.patch = nn.Linear(8 * 8 * in_channels, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width), requires_grad=False)

    def learn_mask_token(self) -> None:
        self.mask_token.requires_grad_(True)

    def depths(self) -> dict[str, int]:
        stem = ("patch", "position", "mask_token")
        return {
            name: 0 if name.startswith(stem) else 2 if name.startswith("norm3") else 1
            for name, _ in self.named_parameters()
        }

    def forward(self, images: Tensor, visible: Tensor | None = None, replaced: Tensor | None = None) -> Features:
        h, w = self.grid(*images.shape[-2:])
        x = self.patch(F.unfold(images, 8, stride=8).transpose(1, 2))
        if replaced is not None:
            assert replaced.shape == x.shape[:2]
            assert self.mask_token.requires_grad or not self.training
            x = torch.where(replaced[..., None], self.mask_token.to(x), x)
        rows, columns = torch.meshgrid(torch.arange(h) / h, torch.arange(w) / w, indexing="ij")
        x = x + self.position(torch.stack([rows, columns], -1).view(-1, 2).to(x))
        if visible is not None:
            x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[-1]))
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = self.norm3(x + self.mlp(self.norm2(x)))
        return Features(x.mean(1), x)
