"""The few layers the VAE and the UNet share: convolutions under their published names, GroupNorm through t2ct.ops."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2ct import ops


class Conv3d(nn.Conv3d):
    """nn.Conv3d through t2ct.ops; with doubled=True of x doubled along each axis by nearest neighbour."""

    def forward(self, x: Tensor, doubled: bool = False) -> Tensor:
        # torch leaves channels-last for a one-channel input and for small volumes on a CPU; elsewhere this is no work
        if doubled:
            return channels_last(ops.upsample_conv3d(x, self.weight, self.bias))
        return channels_last(ops.conv3d(x, self.weight, self.bias, self.stride[0], self.padding[0]))  # type: ignore[arg-type]


class Conv(nn.Module):
    """A convolution under the extra name level ("….conv.weight") that the published checkpoints have.

    in: (B, in_channels, X, Y, Z), out: (B, out_channels, X', Y', Z'), channels-last in memory.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, padding: int | None = None
    ):
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = Conv3d(in_channels, out_channels, kernel, stride, padding)

    def forward(self, x: Tensor, doubled: bool = False) -> Tensor:
        return self.conv(x, doubled)


class GroupNorm(nn.GroupNorm):
    """GroupNorm over (B, C, X, Y, Z), by whichever backend of t2ct.ops serves the tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm(x, self.weight, self.bias, self.num_groups, self.eps)


class GroupNormSiLU(nn.GroupNorm):
    """silu(GroupNorm(x)) in one op: the normalised tensor is never written."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


def channels_last(x: Tensor) -> Tensor:
    """x with channels innermost in memory: what every op behind a model's door expects."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def upsample_nearest(x: Tensor) -> Tensor:
    """(B, C, X, Y, Z) -> (B, C, 2X, 2Y, 2Z), each voxel repeated."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def upsample_trilinear(x: Tensor) -> Tensor:
    """(B, C, X, Y, Z) -> (B, C, 2X, 2Y, 2Z), trilinear with align_corners=False, as MAISI's decoder does."""
    return F.interpolate(x, scale_factor=2.0, mode="trilinear")


def average_pool(x: Tensor) -> Tensor:
    """(B, C, X, Y, Z), even axes -> (B, C, X/2, Y/2, Z/2), each the mean of 2x2x2 voxels, rounded once to x's dtype.

    Three strided additions: on a CPU torch's avg_pool3d leaves channels-last, is an order slower and has no bfloat16.
    """
    h = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    h = h[:, :, ::2] + h[:, :, 1::2]
    h = h[:, :, :, ::2] + h[:, :, :, 1::2]
    return ((h[..., ::2] + h[..., 1::2]) * 0.125).to(x.dtype)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with every parameter zero: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def check_channels(name: str, channels: tuple[int, ...], groups: int) -> None:
    """ValueError unless every width is a positive multiple of the number of norm groups."""
    if not channels or any(c < 1 or c % groups for c in channels):
        raise ValueError(
            f"{name}: every entry of channels must be a positive multiple of norm_groups={groups}, got {channels}"
        )


def check_volume(name: str, x: Tensor, channels: int) -> None:
    """ValueError unless x is a non-empty floating (B, channels, X, Y, Z)."""
    if x.dim() != 5 or x.shape[1] != channels or not x.numel() or not x.is_floating_point():
        raise ValueError(f"{name} must be floating (B, {channels}, X, Y, Z), got {tuple(x.shape)} {x.dtype}")
