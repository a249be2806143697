"""The volumetric VAE: (B, 1, X, Y, Z) in [0, 1] <-> latents (B, 4, X/4, Y/4, Z/4).

The network of MAISI's AutoencoderKL (Guo et al. 2024, arXiv 2409.11169) that Molino et al. 2025 use; its state dict
has the published keys.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2ct import stream
from t2ct.models.fields import DEPTH, POSITIVE, check_fields
from t2ct.models.layers import (
    Conv,
    Conv3d,
    GroupNorm,
    GroupNormSiLU,
    channels_last,
    check_channels,
    check_volume,
    norm_silu_conv,
)
from t2ct.models.window import decode_windows, window_room
from t2ct.ops.dispatch import watched
from t2ct.stream import Budget, Node, Plan

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
    """Sizes of a VAE; the defaults are the published network (20.9 M parameters).

    ValueError for what is no size, and where a width is no multiple of the norm groups.
    """

    channels: tuple[int, ...] = (64, 128, 256)
    norm_groups: int = 32
    num_res_blocks: int = 2
    latent_channels: int = 4
    in_channels: int = 1
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self, "VAEConfig.", num_res_blocks=DEPTH, norm_eps=POSITIVE)
        check_channels("VAEConfig", self.channels, self.norm_groups)

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


def _nodes(stack: Stack, prefix: str, nodes: list[Node]) -> list[Node]:
    """`nodes` and one for every convolution of the stack: the network as `t2ct.stream` runs it."""

    def width(conv: nn.Module) -> int:
        return conv.conv.conv.out_channels  # type: ignore[union-attr,return-value]

    norm: tuple[str, nn.GroupNorm] | None = None
    for i, block in enumerate(stack.blocks):
        name, at = f"{prefix}.blocks.{i}", len(nodes) - 1
        if isinstance(block, GroupNorm):
            norm = (name, block)
        elif isinstance(block, ResBlock):
            shortcut = "" if isinstance(block.nin_shortcut, nn.Identity) else f"{name}.nin_shortcut.conv.conv"
            for part in ("1", "2"):
                n, conv = getattr(block, "norm" + part), getattr(block, "conv" + part)
                node = Node(f"{name}.conv{part}.conv.conv", len(nodes) - 1, width(conv))
                nodes.append(replace(node, norm=f"{name}.norm{part}", groups=n.num_groups, eps=n.eps))
            nodes[-1] = replace(nodes[-1], residual=at, shortcut=shortcut)
        elif isinstance(block, (Upsample, Downsample)):
            way = "up" if isinstance(block, Upsample) else "down"
            nodes.append(Node(f"{name}.conv.conv.conv", at, width(block.conv), resample=way))
        else:
            nodes.append(Node(f"{name}.conv.conv", at, width(block), silu=False))
            if norm is not None:
                nodes[-1] = replace(nodes[-1], norm=norm[0], groups=norm[1].num_groups, eps=norm[1].eps)
                norm = None
    return nodes


Step = Callable[[int], None] | None
PLAIN = {Stack, nn.ModuleList, DoubleConv, Conv, Conv3d, ResBlock, GroupNorm, GroupNormSiLU, Upsample, Downsample}


def _changed(module: nn.Module) -> bool:
    """Was it replaced by another kind, or does something want to see its input and output?"""
    return type(module) not in {*PLAIN, nn.Identity} or bool(module._forward_hooks or module._forward_pre_hooks)


class VAE(nn.Module):
    """The VAE of the published system. `load_state_dict` takes the published file as it is."""

    def __init__(self, config: VAEConfig | None = None):
        super().__init__()
        self.config = config = config or VAEConfig()
        z = config.latent_channels
        self.encoder = _stack(config, config.channels, config.in_channels, z, Downsample)
        self.decoder = _stack(config, config.channels[::-1], z, config.in_channels, Upsample)
        self.quant_conv_mu = Conv(z, z, kernel=1)
        self.quant_conv_log_sigma = Conv(z, z, kernel=1)
        self.post_quant_conv = Conv(z, z, kernel=1)

    def nodes(self, direction: str) -> tuple[Node, ...]:
        """The convolutions of "encode" or "decode" in order, as `t2ct.stream` plans and runs them."""
        config = self.config
        if direction == "encode":
            return tuple(_nodes(self.encoder, "encoder", [Node("", -1, config.in_channels)]))
        z = config.latent_channels
        inlet = [Node("", -1, z), Node("post_quant_conv.conv", 0, z, kernel=1)]
        return tuple(_nodes(self.decoder, "decoder", inlet))

    def plan(
        self, direction: str, shape: Sequence[int], memory_budget: Budget = None, *,
        spool_dir: str | Path | None = None, hu: bool = False, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Plan:  # fmt: skip
        """How "encode" or "decode" of an input of `shape` (B, C, X, Y, Z) would run, without running it.

        dtype, device: default: those of the weights; otherwise arguments and errors as `decode`.
        """
        if direction not in ("encode", "decode"):
            raise ValueError(f'VAE.plan: direction must be "encode" or "decode", got {direction!r}')
        weight = next(self.parameters())
        return stream.plan_for(self.nodes(direction), shape, dtype or weight.dtype, device or weight.device,
                               memory_budget, spool_dir, 2 if hu else None)  # fmt: skip

    def encode(
        self, x: Tensor, memory_budget: Budget = None, *, spool_dir: str | Path | None = None, step: Step = None
    ) -> tuple[Tensor, Tensor]:
        """(B, 1, X, Y, Z) in [0, 1] -> mean and standard deviation, each (B, 4, X//4, Y//4, Z//4), x's dtype.

        Without a gradient, or with a budget, it runs in patches, exactly, inside `memory_budget`: as `decode`. Axes
        that are no multiple of 4 lose their last planes, as in the published network: a warning says so.
        """
        check_volume("VAE.encode: x", x, self.config.in_channels)
        if min(x.shape[2:]) < self.config.factor:
            raise ValueError(f"VAE.encode: every axis of x must be >= {self.config.factor}, got {tuple(x.shape)}")
        if any(n % self.config.factor for n in x.shape[2:]) and not watched(x):
            kept = tuple(n // self.config.factor * self.config.factor for n in x.shape[2:])
            told = f"wanted multiples of {self.config.factor} voxels, got {tuple(x.shape[2:])}: decoding gives {kept}"
            warnings.warn(f"VAE.encode: {told}", stacklevel=2)
        if self._streams("encode", x, memory_budget):
            h = self._stream("encode", x, memory_budget, spool_dir, step=step)
        else:
            h = self.encoder(channels_last(x))
        mu, log_variance = self.quant_conv_mu(h), self.quant_conv_log_sigma(h)
        return mu, torch.exp(log_variance.clamp(-30.0, 20.0) / 2)

    def decode(
        self, z: Tensor, memory_budget: Budget = None, *, spool_dir: str | Path | None = None, hu: bool = False,
        step: Step = None, method: str = "exact",
    ) -> Tensor:  # fmt: skip
        """Latents (B, 4, X, Y, Z) -> (B, 1, 4X, 4Y, 4Z), about [0, 1] (not clipped), z's dtype.

        memory_budget  bytes, or "6GB": everything above the weights and z, the result included. None: what the device
                       has free. The volume is decoded in patches of whole planes, exactly: every budget gives the
                       same bits. docs/patches.md. Where a gradient is wanted this is so only if a budget is named,
                       which then holds for the backward pass too: it computes the network again.
        spool_dir      a folder where files may hold tensors that do not fit the budget of a CPU; without it they are
                       computed again. On a GPU they lie in the host's memory.
        hu             int16 HU instead, rounded and clipped to [-1000, 1000]
        step           called after every patch with the operations done
        method         "window": overlapping windows of 80^3 latent voxels, blended, as the published system decodes.
                       Not the network's own function: for comparison
        Raises         ValueError: another shape, latents that are not finite where no gradient is wanted, a budget
                       below the smallest plan (says which is); OSError: no room for the spool.
        """
        check_volume("VAE.decode: z", z, self.config.latent_channels)
        if method not in ("exact", "window"):
            raise ValueError(f'VAE.decode: method must be "exact" or "window", got {method!r}')
        if method == "window":
            room = None if memory_budget is None else window_room(memory_budget, z, self.config.factor)
            y = decode_windows(
                lambda part: self.decode(part, room, spool_dir=spool_dir, step=step), z, self.config.factor
            )
            return unit_to_hu(y) if hu else y
        if self._streams("decode", z, memory_budget):
            if not torch.isfinite(z).all():
                raise ValueError("VAE.decode: z must be finite, got NaN or infinity in the latents")
            return self._stream("decode", z, memory_budget, spool_dir, hu, step)
        y = self.decoder(self.post_quant_conv(channels_last(z)))
        return unit_to_hu(y) if hu else y

    def _streams(self, direction: str, x: Tensor, budget: Budget) -> bool:
        """Does t2ct.stream run it? Not where something must see the modules or differentiate through them."""
        reason = ""
        if watched(x):
            reason = "tensors that are compiled, traced or transformed"
        elif any(_changed(m) for m in self.modules() if m is not self):
            reason = "modules that were replaced or hooked"
        if reason and budget is not None:
            raise ValueError(f"VAE.{direction}: memory_budget does not go with {reason}")
        learns = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        return not reason and (budget is not None or not learns)

    def _stream(self, direction, x, budget, spool_dir, hu: bool = False, step: Step = None) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            parameters = {k: p.to(dtype) for k, p in self.named_parameters()}
            return stream.execute(self.nodes(direction), parameters, x.to(dtype), budget, spool_dir,
                                  unit_to_hu if hu else None, torch.int16 if hu else None, step)  # fmt: skip

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction from a latent sampled as mu + sigma * noise, and mu, sigma: what training needs."""
        mu, sigma = self.encode(x)
        noise = torch.randn(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
        return self.decode(mu + sigma * noise), mu, sigma
