"""The volumetric VAE: (B, 1, X, Y, Z) in [0, 1] <-> latents (B, 4, X/4, Y/4, Z/4).

The network of MAISI's AutoencoderKL (Guo et al. 2024, arXiv 2409.11169) that Molino et al. 2025 use; its state dict
has the published keys.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2ct.models.layers import (
    Conv,
    GroupNorm,
    GroupNormSiLU,
    channels_last,
    check_channels,
    check_volume,
    norm_silu_conv,
)

HU_MIN, HU_MAX = -1000.0, 1000.0  # the window in which the networks see a CT


def hu_to_unit(hu: Tensor) -> Tensor:
    """HU -> [0, 1]: (clip(hu, -1000, 1000) + 1000) / 2000, in hu's dtype if floating, else float32."""
    hu = hu if hu.is_floating_point() else hu.float()
    return (hu.clamp(HU_MIN, HU_MAX) - HU_MIN) / (HU_MAX - HU_MIN)


def unit_to_hu(x: Tensor) -> Tensor:
    """[0, 1] -> int16 HU, rounded and clipped to [-1000, 1000]."""
    return (x.float() * (HU_MAX - HU_MIN) + HU_MIN).clamp_(HU_MIN, HU_MAX).round_().to(torch.int16)


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a VAE; the defaults are the published network (20.9 M parameters)."""

    channels: tuple[int, ...] = (64, 128, 256)
    norm_groups: int = 32
    num_res_blocks: int = 2
    latent_channels: int = 4
    in_channels: int = 1
    norm_eps: float = 1e-6

    @property
    def factor(self) -> int:
        """How many voxels of the volume one latent voxel spans along each axis."""
        return 2 ** (len(self.channels) - 1)


class DoubleConv(nn.Module):
    """A convolution under the two extra name levels of the published VAE ("….conv.conv.weight")."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, padding: int | None = None
    ):
        super().__init__()
        self.conv = Conv(in_channels, out_channels, kernel, stride, padding)

    def forward(self, x: Tensor, doubled: str | None = None, residual: Tensor | None = None) -> Tensor:
        return self.conv(x, doubled, residual)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 convolution on x where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, in_channels, eps)
        self.conv1 = DoubleConv(in_channels, out_channels)
        self.norm2 = GroupNormSiLU(groups, out_channels, eps)
        self.conv2 = DoubleConv(out_channels, out_channels)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else DoubleConv(in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        h, stats = norm_silu_conv(self.norm1, self.conv1, x, following=self.norm2)
        same = isinstance(self.nin_shortcut, nn.Identity)
        h, _ = norm_silu_conv(self.norm2, self.conv2, h, x if same else None, stats=stats, overwrite=True)
        return h if same else self.nin_shortcut(x, residual=h)


class Downsample(nn.Module):
    """Halve each axis: a zero voxel after the end (the reference's asymmetry), then a convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = DoubleConv(channels, channels, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(channels_last(F.pad(x, (0, 1) * 3)))


class Upsample(nn.Module):
    """Double each axis: trilinear, then a 3x3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = DoubleConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, doubled="trilinear")


class Stack(nn.Module):
    """The published encoder or decoder: a flat list called `blocks`."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _stack(config: VAEConfig, channels: tuple[int, ...], inlet: int, outlet: int, resample: type[nn.Module]) -> Stack:
    blocks: list[nn.Module] = [DoubleConv(inlet, channels[0])]
    width = channels[0]
    for level, out in enumerate(channels):
        for _ in range(config.num_res_blocks):
            blocks.append(ResBlock(width, out, config.norm_groups, config.norm_eps))
            width = out
        if level < len(channels) - 1:
            blocks.append(resample(width))
    blocks += [GroupNorm(config.norm_groups, width, config.norm_eps), DoubleConv(width, outlet)]  # no SiLU here
    return Stack(blocks)


class VAE(nn.Module):
    """The VAE of the published system. `load_state_dict` takes the published file as it is.

    config: VAEConfig; ValueError where a width is no multiple of the norm groups.
    """

    def __init__(self, config: VAEConfig | None = None):
        super().__init__()
        self.config = config = config or VAEConfig()
        check_channels("VAEConfig", config.channels, config.norm_groups)
        z = config.latent_channels
        self.encoder = _stack(config, config.channels, config.in_channels, z, Downsample)
        self.decoder = _stack(config, config.channels[::-1], z, config.in_channels, Upsample)
        self.quant_conv_mu = Conv(z, z, kernel=1)
        self.quant_conv_log_sigma = Conv(z, z, kernel=1)
        self.post_quant_conv = Conv(z, z, kernel=1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, X, Y, Z) in [0, 1] -> mean and standard deviation, each (B, 4, X//4, Y//4, Z//4), x's dtype."""
        check_volume("VAE.encode: x", x, self.config.in_channels)
        if min(x.shape[2:]) < self.config.factor:
            raise ValueError(f"VAE.encode: every axis of x must be >= {self.config.factor}, got {tuple(x.shape)}")
        h = self.encoder(channels_last(x))
        mu, log_variance = self.quant_conv_mu(h), self.quant_conv_log_sigma(h)
        return mu, torch.exp(log_variance.clamp(-30.0, 20.0) / 2)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, 4, X, Y, Z) -> (B, 1, 4X, 4Y, 4Z), about [0, 1] (not clipped), z's dtype."""
        check_volume("VAE.decode: z", z, self.config.latent_channels)
        return self.decoder(self.post_quant_conv(channels_last(z)))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction from a latent sampled as mu + sigma * noise, and mu, sigma: what training needs."""
        mu, sigma = self.encode(x)
        noise = torch.randn(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
        return self.decode(mu + sigma * noise), mu, sigma
