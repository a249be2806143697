"""The diffusion UNet: the velocity of a latent volume, given time, report embedding, class and voxel spacing.

The network of MAISI's DiffusionModelUNet (Guo et al. 2024, arXiv 2409.11169) that Molino et al. 2025 use; its state
dict has the published keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2ct.models.fields import DEPTH, POSITIVE, check_fields
from t2ct.models.layers import Conv, GroupNormSiLU, channels_last, check_channels, check_volume, zeroed
from t2ct.models.unet_blocks import DownBlock, MiddleBlock, UpBlock, mlp, timestep_embedding


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; the defaults are the published network (217.7 M parameters).

    ValueError where widths, groups, head size and levels are no sizes, or do not fit one another.
    """

    channels: tuple[int, ...] = (64, 128, 256, 512)
    attention_levels: tuple[bool, ...] = (False, False, True, True)
    head_dim: int = 32
    cross_attention_dim: int = 768
    norm_groups: int = 32
    num_res_blocks: int = 2
    in_channels: int = 4
    out_channels: int = 4
    num_class_embeds: int = 128
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self, "UNetConfig.", num_res_blocks=DEPTH, norm_eps=POSITIVE)
        check_channels("UNetConfig", self.channels, self.norm_groups)
        if len(self.attention_levels) != len(self.channels):
            raise ValueError(
                f"UNetConfig: attention_levels must have {len(self.channels)} entries, got {self.attention_levels}"
            )
        attended = [n for n, on in zip(self.channels, self.attention_levels, strict=True) if on] + [self.channels[-1]]
        if any(n % self.head_dim for n in attended):
            raise ValueError(
                f"UNetConfig: widths with attention must be multiples of head_dim={self.head_dim}, got {attended}"
            )

    @property
    def factor(self) -> int:
        """Every axis of the latents must be a multiple of this."""
        return 2 ** (len(self.channels) - 1)


class UNet(nn.Module):
    """The UNet of the published system. `load_state_dict` takes the published file as it is."""

    def __init__(self, config: UNetConfig | None = None):
        super().__init__()
        self.config = c = config or UNetConfig()
        width = c.channels[0]
        time_dim = 4 * width
        self.conv_in = Conv(c.in_channels, width)
        self.time_embed = mlp(width, time_dim)
        self.class_embedding = nn.Embedding(c.num_class_embeds, time_dim)
        self.spacing_layer = mlp(3, time_dim)

        skips = [width]  # width of every tensor the down path hands across, in order
        self.down_blocks = nn.ModuleList()
        for level, (out, attend) in enumerate(zip(c.channels, c.attention_levels, strict=True)):
            last = level == len(c.channels) - 1
            self.down_blocks.append(DownBlock(c, width, out, 2 * time_dim, attend, downsample=not last))
            skips += [out] * (c.num_res_blocks + (not last))
            width = out
        self.middle_block = MiddleBlock(c, width, 2 * time_dim)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(c.channels))):
            taken = [skips.pop() for _ in range(c.num_res_blocks + 1)]
            out, attend = c.channels[level], c.attention_levels[level]
            self.up_blocks.append(UpBlock(c, width, taken, out, 2 * time_dim, attend, upsample=level > 0))
            width = out
        self.out = nn.Sequential(
            GroupNormSiLU(c.norm_groups, width, c.norm_eps),
            nn.Identity(),  # SiLU's place in the published numbering; it is fused into the norm
            zeroed(Conv(width, c.out_channels)),
        )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, class_labels: Tensor, spacing: Tensor) -> Tensor:
        """Velocity (K*B, 4, X, Y, Z) of the latents x (B, 4, X, Y, Z), in x's dtype.

        x             latents; every axis a multiple of `config.factor` (8 for the published network)
        timesteps     (B,), floating, 0 to 1000
        context       (K*B, L, cross_attention_dim), any L >= 1. K > 1 evaluates K contexts per latent, context k*B + b
                      for latent b (as torch.cat([conditional, unconditional]) orders them): everything before the first
                      cross-attention is computed once.
        class_labels  (B,) int64, 1 = CT
        spacing       (B, 3), mm x 100
        """
        self._check(x, timesteps, context, class_labels, spacing)
        emb = self.time_embed(timestep_embedding(timesteps, self.config.channels[0]).to(x.dtype))
        emb = emb + self.class_embedding(class_labels).to(x.dtype)
        emb = torch.cat((emb, self.spacing_layer(spacing.to(x.dtype))), dim=1)
        emb = torch.nn.functional.silu(emb)  # every residual block starts with it

        h = self.conv_in(channels_last(x))
        skips = [h]
        for block in self.down_blocks:
            h, emb = block(h, emb, context, skips)
        h, emb = self.middle_block(h, emb, context)
        for block in self.up_blocks:
            h = block(h, emb, context, skips)
        return self.out(h)

    def _check(self, x: Tensor, timesteps: Tensor, context: Tensor, class_labels: Tensor, spacing: Tensor) -> None:
        c = self.config
        check_volume("UNet: x", x, c.in_channels)
        if any(n % c.factor for n in x.shape[2:]):
            raise ValueError(f"UNet: every axis of x must be a multiple of {c.factor}, got {tuple(x.shape)}")
        b = x.shape[0]
        good = context.dim() == 3 and context.shape[1] >= 1 and context.shape[2] == c.cross_attention_dim
        if not good or context.shape[0] % b or not context.shape[0]:
            raise ValueError(
                f"UNet: context must be (K*{b}, L>=1, {c.cross_attention_dim}), got {tuple(context.shape)}"
            )
        for name, value, want in (
            ("timesteps", timesteps, (b,)),
            ("class_labels", class_labels, (b,)),
            ("spacing", spacing, (b, 3)),
        ):
            if tuple(value.shape) != want:
                raise ValueError(f"UNet: {name} must be {want}, got {tuple(value.shape)}")
