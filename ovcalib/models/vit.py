"""A small vision transformer for 32x32 images.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021. Three convolutions make the patches of 4x4 pixels
(Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021), and the patches are averaged in front of
the classifier; there is no class token and no BatchNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 4  # pixels


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, tokens, width] to the same shape."""
        n, tokens, width = x.shape
        query, key, value = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(n, tokens, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class CifarViT(nn.Module):
    """Images [N, 3, 32, 32] to logits [N, num_classes].

    depth, width, heads    number of blocks, channels of a token, heads of each attention
    """

    def __init__(self, depth: int, width: int, heads: int, num_classes: int) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(3, width // 4, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
        )
        self.positions = nn.Parameter(0.02 * torch.randn(1, width, 32 // PATCH, 32 // PATCH))
        self.blocks = nn.Sequential(*(Block(width, heads, 2 * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        positions: Tensor = self.positions
        if x.shape[-2:] != positions.shape[-2:]:  # smaller images, on which training may begin
            positions = F.interpolate(positions, size=x.shape[-2:], mode="bilinear")
        x = (x + positions).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))  # type: ignore[no-any-return]
