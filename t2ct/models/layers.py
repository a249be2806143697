"""The few layers the VAE and the UNet share: convolutions under their published names, GroupNorm through t2ct.ops."""

from torch import Tensor, nn

from t2ct import ops
from t2ct.ops.dispatch import channels_last


class Conv3d(nn.Conv3d):
    """nn.Conv3d through t2ct.ops, plus `residual`; doubled="nearest" or "trilinear" convolves x at twice its size."""

    def forward(self, x: Tensor, doubled: str | None = None, residual: Tensor | None = None) -> Tensor:
        # torch leaves channels-last for a one-channel input and for small volumes on a CPU; elsewhere this is no work
        if doubled:
            return channels_last(ops.upsample_conv3d(x, self.weight, self.bias, doubled))
        stride, padding = self.stride[0], self.padding[0]
        return channels_last(ops.conv3d(x, self.weight, self.bias, stride, padding, residual))  # type: ignore[arg-type]


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

    def forward(self, x: Tensor, doubled: str | None = None, residual: Tensor | None = None) -> Tensor:
        return self.conv(x, doubled, residual)


class GroupNorm(nn.GroupNorm):
    """GroupNorm over (B, C, X, Y, Z), by whichever backend of t2ct.ops serves the tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm(x, self.weight, self.bias, self.num_groups, self.eps)


class GroupNormSiLU(nn.GroupNorm):
    """silu(GroupNorm(x)) in one op: the normalised tensor is never written."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


def norm_silu_conv(
    norm: nn.Module,
    conv: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    channel_bias: Tensor | None = None,
    stats: ops.Stats | None = None,
    following: nn.Module | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, ops.Stats | None]:
    """conv(norm(x)) [+ channel_bias] [+ residual] as one op, and the statistics of the result for the norm `following`.

    conv: a Conv. overwrite: x is not needed afterwards.
    Modules that somebody has put in its place, or hooked, are called as they are.
    """
    *outer, last = conv.modules()
    hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in (norm, *outer, last))
    if type(norm) is GroupNormSiLU and type(last) is Conv3d and len(outer) <= 2 and not hooked:
        y, stats = ops.group_norm_silu_conv3d_stats(
            x, norm.weight, norm.bias, last.weight, last.bias, norm.num_groups, norm.eps, residual,
            channel_bias=channel_bias, stats=stats,
            next_groups=following.num_groups if type(following) is GroupNormSiLU else 0, overwrite=overwrite,
        )  # fmt: skip
        return channels_last(y), stats
    h = conv(norm(x))
    if channel_bias is not None:
        h = h + channel_bias[:, :, None, None, None]
    return h if residual is None else h + residual, None


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
