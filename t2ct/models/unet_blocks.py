"""Residual and transformer blocks of the UNet, under their published names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2ct import ops
from t2ct.models.layers import Conv, GroupNorm, GroupNormSiLU, norm_silu_conv, zeroed

if TYPE_CHECKING:
    from t2ct.models.unet import UNetConfig


def mlp(in_features: int, out_features: int) -> nn.Sequential:
    """Linear, SiLU, Linear: the embedding of time and of spacing."""
    return nn.Sequential(nn.Linear(in_features, out_features), nn.SiLU(), nn.Linear(out_features, out_features))


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """(B,) -> (B, dim) float32: cosines, then sines, of geometrically spaced frequencies (Ho et al. 2020)."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angle = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * steps / half)
    return F.pad(torch.cat((angle.cos(), angle.sin()), dim=1), (0, dim % 2))


def repeat_batch(x: Tensor, batch: int) -> Tensor:
    """x, its batch repeated as a whole up to `batch` rows. No expanded view: torch.cat would drop channels-last."""
    return x if x.shape[0] == batch else torch.cat([x] * (batch // x.shape[0]))


class ResBlock(nn.Module):
    """norm, SiLU, [resample], conv, + time, norm, SiLU, conv, + skip. `emb` comes with its SiLU applied."""

    def __init__(self, c: UNetConfig, in_channels: int, out_channels: int, emb_dim: int, resample: str | None = None):
        super().__init__()
        self.resample = resample
        self.norm1 = GroupNormSiLU(c.norm_groups, in_channels, c.norm_eps)
        self.conv1 = Conv(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(emb_dim, out_channels)
        self.norm2 = GroupNormSiLU(c.norm_groups, out_channels, c.norm_eps)
        self.conv2 = zeroed(Conv(out_channels, out_channels))
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else Conv(in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        time, stats = self.time_emb_proj(emb), None
        if self.resample is None:
            h, stats = norm_silu_conv(self.norm1, self.conv1, x, None, time, None, self.norm2)
        else:
            h = self.norm1(x)
            if self.resample == "down":
                x, h = ops.average_pool(x), ops.average_pool(h)
            h = self.conv1(h, doubled="nearest" if self.resample == "up" else None)
            h += time[:, :, None, None, None]  # in place: no gradient needs a convolution's output
        if self.resample == "up":
            x = ops.upsample(x)
        same = isinstance(self.skip_connection, nn.Identity)
        h, _ = norm_silu_conv(self.norm2, self.conv2, h, x if same else None, None, stats, overwrite=True)
        return h if same else self.skip_connection(x, residual=h)


class Attention(nn.Module):
    """Multi-head attention of tokens (B, N, dim) on themselves, or on a context (B, L, context_dim)."""

    def __init__(self, dim: int, head_dim: int, context_dim: int | None = None):
        super().__init__()
        self.heads = dim // head_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        return self.out_proj(ops.attention(q, k, v).transpose(1, 2).flatten(2))

    def of_one_token(self, context: Tensor) -> Tensor:
        """Attention to a single token (B, 1, context_dim) -> (B, 1, dim): its softmax is 1 whatever the query, so the
        result is the same vector everywhere, and queries and keys need not be computed."""
        return self.out_proj(self.to_v(context))


class FeedForward(nn.Module):
    """GEGLU feed-forward, four times as wide inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear1 = nn.Linear(dim, 8 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.linear1(x).chunk(2, dim=-1)
        return self.linear2(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each behind a LayerNorm and added."""

    def __init__(self, dim: int, head_dim: int, context_dim: int):
        super().__init__()
        self.attn1 = Attention(dim, head_dim)
        self.ff = FeedForward(dim)
        self.attn2 = Attention(dim, head_dim, context_dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        if context.shape[1] == 1:
            cross = self.attn2.of_one_token(context)
        else:
            cross = self.attn2(repeat_batch(self.norm2(x), context.shape[0]), context)
        x = repeat_batch(x, context.shape[0]) + cross
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the voxels of a volume, between two 1x1x1 convolutions, added to its input.

    x (B, C, X, Y, Z), context (K*B, L, D) -> (K*B, C, X, Y, Z); self-attention runs before the context matters.
    """

    def __init__(self, c: UNetConfig, channels: int):
        super().__init__()
        self.norm = GroupNorm(c.norm_groups, channels, c.norm_eps)
        self.proj_in = Conv(channels, channels, kernel=1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, c.head_dim, c.cross_attention_dim)])
        self.proj_out = zeroed(Conv(channels, channels, kernel=1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        size = x.shape[2:]
        h = self.proj_in(self.norm(x)).permute(0, 2, 3, 4, 1).flatten(1, 3)  # a view: channels are innermost
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h.unflatten(1, size).permute(0, 4, 1, 2, 3))
        h += repeat_batch(x, h.shape[0])
        return h


class DownBlock(nn.Module):
    """Residual blocks (each with attention where the level has it), then a residual block that halves the volume."""

    def __init__(self, c: UNetConfig, width: int, out: int, emb_dim: int, attend: bool, downsample: bool):
        super().__init__()
        if attend:
            self.attentions = nn.ModuleList([SpatialTransformer(c, out) for _ in range(c.num_res_blocks)])
        self.resnets = nn.ModuleList(
            [ResBlock(c, width if i == 0 else out, out, emb_dim) for i in range(c.num_res_blocks)]
        )
        if downsample:
            self.downsampler = ResBlock(c, out, out, emb_dim, resample="down")
        self.attend, self.downsample = attend, downsample

    def forward(self, h: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The block's output and emb, whose batch has grown to the context's if attention came by; appends to skips."""
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, emb)
            if self.attend:
                h = self.attentions[i](h, context)
                emb = repeat_batch(emb, h.shape[0])
            skips.append(h)
        if self.downsample:
            h = self.downsampler(h, emb)
            skips.append(h)
        return h, emb


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, c: UNetConfig, width: int, emb_dim: int):
        super().__init__()
        self.resnet_1 = ResBlock(c, width, width, emb_dim)
        self.attention = SpatialTransformer(c, width)
        self.resnet_2 = ResBlock(c, width, width, emb_dim)

    def forward(self, h: Tensor, emb: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        h = self.attention(self.resnet_1(h, emb), context)
        emb = repeat_batch(emb, h.shape[0])
        return self.resnet_2(h, emb), emb


class UpBlock(nn.Module):
    """Residual blocks on (h, skip), each with attention where the level has it, then one that doubles the volume."""

    def __init__(
        self, c: UNetConfig, width: int, skips: list[int], out: int, emb_dim: int, attend: bool, upsample: bool
    ):
        super().__init__()
        if attend:
            self.attentions = nn.ModuleList([SpatialTransformer(c, out) for _ in skips])
        self.resnets = nn.ModuleList(
            [ResBlock(c, (width if i == 0 else out) + skip, out, emb_dim) for i, skip in enumerate(skips)]
        )
        if upsample:
            self.upsampler = ResBlock(c, out, out, emb_dim, resample="up")
        self.attend, self.upsample = attend, upsample

    def forward(self, h: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat((h, repeat_batch(skips.pop(), h.shape[0])), dim=1), emb)
            if self.attend:
                h = self.attentions[i](h, context)
        return self.upsampler(h, emb) if self.upsample else h
