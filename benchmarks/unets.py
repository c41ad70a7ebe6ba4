"""Two U-Nets in plain torch, so that a benchmark of convolutions needs no further package."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two 3x3 convolutions with an embedding of the time step between them."""

    def __init__(self, inner: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, inner), nn.GroupNorm(32, out)
        self.conv1, self.conv2 = nn.Conv2d(inner, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.skip = nn.Conv2d(inner, out, 1) if inner != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: (batch, inner, height, width); time: (batch, time)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(hidden)))


class Attention(nn.Module):
    """Self-attention over the pixels, then attention to the text, then a gated feed-forward layer."""

    def __init__(self, width: int, text: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.queries = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.keys = nn.ModuleList(nn.Linear(size, width, bias=False) for size in (width, text))
        self.values = nn.ModuleList(nn.Linear(size, width, bias=False) for size in (width, text))
        self.outs = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x: (batch, width, height, width'); text: (batch, tokens, text)."""
        tokens = x.flatten(2).transpose(1, 2)
        for step in range(2):
            normed = self.norms[step](tokens)
            other = normed if step == 0 else text
            parts = (self.queries[step](normed), self.keys[step](other), self.values[step](other))
            split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
            mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
            tokens = tokens + self.outs[step](mixed)
        value, gate = self.up(self.norms[2](tokens)).chunk(2, -1)
        tokens = tokens + self.down(value * F.gelu(gate))
        return tokens.transpose(1, 2).view(x.shape)


class DiffusionUNet(nn.Module):
    """A denoiser of latents in the manner of Stable Diffusion: three resolutions, attention at all but the finest."""

    def __init__(self, widths: tuple[int, ...] = (320, 640, 1280), text: int = 768) -> None:
        super().__init__()
        time = 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(4, widths[0], 3, padding=1)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        inner = widths[0]
        for level, width in enumerate(widths):
            parts = [Residual(inner, width, time), Residual(width, width, time)]
            attention = Attention(width, text) if level else nn.Identity()
            shrink = nn.Conv2d(width, width, 3, stride=2, padding=1) if level < len(widths) - 1 else nn.Identity()
            self.downs.append(nn.ModuleList([*parts, attention, shrink]))
            inner = width
        self.middle = nn.ModuleList([Residual(inner, inner, time), Attention(inner, text)])
        for level, width in reversed(list(enumerate(widths))):
            parts = [Residual(inner + width, width, time), Residual(width, width, time)]
            attention = Attention(width, text) if level else nn.Identity()
            grow = nn.Conv2d(width, width, 3, padding=1) if level else nn.Identity()
            self.ups.append(nn.ModuleList([*parts, attention, grow]))
            inner = width
        self.head = nn.Conv2d(inner, 4, 3, padding=1)

    def forward(self, sample: Tensor, text: Tensor, steps: Tensor) -> Tensor:
        """sample: (batch, 4, side, side); text: (batch, tokens, text); steps: (batch, widths[0]) -> as sample."""
        time, x, kept = self.time(steps), self.first(sample), []
        for first, second, attention, shrink in self.downs:
            x = second(first(x, time), time)
            x = attention(x, text) if isinstance(attention, Attention) else x
            kept.append(x)
            x = shrink(x)
        x = self.middle[1](self.middle[0](x, time), text)
        for first, second, attention, grow in self.ups:
            x = second(first(torch.cat([x, kept.pop()], 1), time), time)
            x = attention(x, text) if isinstance(attention, Attention) else x
            if not isinstance(grow, nn.Identity):
                x = grow(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.head(x)


class VolumeBlock(nn.Module):
    """Two 3x3x3 convolutions."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv3d(inner, out, 3, padding=1), nn.Conv3d(out, out, 3, padding=1)
        self.norm1, self.norm2 = nn.InstanceNorm3d(out, affine=True), nn.InstanceNorm3d(out, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inner, depth, height, width) -> (batch, out, depth, height, width)."""
        x = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        return F.leaky_relu(self.norm2(self.conv2(x)), 0.01)


class VolumeUNet(nn.Module):
    """A segmenter of volumes in the manner of nnU-Net."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256, 320)) -> None:
        super().__init__()
        self.first = VolumeBlock(1, widths[0])
        pairs = list(pairwise(widths))
        self.shrinks = nn.ModuleList(nn.Conv3d(inner, out, 2, stride=2) for inner, out in pairs)
        self.downs = nn.ModuleList(VolumeBlock(out, out) for _, out in pairs)
        self.grows = nn.ModuleList(nn.ConvTranspose3d(out, inner, 2, stride=2) for inner, out in reversed(pairs))
        self.ups = nn.ModuleList(VolumeBlock(2 * inner, inner) for inner, _ in reversed(pairs))
        self.head = nn.Conv3d(widths[0], 3, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(batch, 1, side, side, side) -> three classes for each voxel."""
        x = self.first(pixel_values)
        kept = []
        for shrink, down in zip(self.shrinks, self.downs, strict=True):
            kept.append(x)
            x = down(shrink(x))
        for grow, up in zip(self.grows, self.ups, strict=True):
            x = up(torch.cat([grow(x), kept.pop()], 1))
        return self.head(x)
