"""Vision tower of CLIP3D: the CT-ViT encoder, whose tokens go through a cosine vector quantiser.

The quirks that the published weights depend on are kept on purpose and are marked where they occur.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2ct.models.attention import merge_heads, split_heads
from t2ct.models.fields import DEPTH, check_fields
from t2ct.models.quantizer import CosineQuantizer
from t2ct.ops.attention import Relative, attention

COSINE_SCALE = 8.0  # logits of the cosine attention are multiplied by this


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower; the defaults are the published network.

    image_size is the extent in X and in Y, depth the nominal extent in Z, all in voxels; patches are
    patch_size x patch_size x temporal_patch_size. Z may differ from depth by whole patches: no weight depends on it.
    """

    dim: int = 768
    image_size: int = 512
    patch_size: int = 16
    temporal_patch_size: int = 16
    spatial_layers: int = 4
    temporal_layers: int = 4
    heads: int = 8
    head_dim: int = 32
    codebook_size: int = 8192
    depth: int = 128

    def __post_init__(self) -> None:
        check_fields(self, "VisionConfig.", spatial_layers=DEPTH, temporal_layers=DEPTH)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"VisionConfig.image_size: wanted a multiple of patch_size={self.patch_size}, got {self.image_size}"
            )
        if self.depth % self.temporal_patch_size:
            raise ValueError(
                f"VisionConfig.depth: wanted a multiple of temporal_patch_size={self.temporal_patch_size}, "
                f"got {self.depth}"
            )

    @property
    def grid(self) -> int:
        """Patches along X and along Y."""
        return self.image_size // self.patch_size


class LayerNorm(nn.Module):
    """LayerNorm whose shift is the constant `beta` (a buffer of zeros in the published file)."""

    beta: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class PositionGenerator(nn.Module):
    """Depthwise 3x3x3 convolution over the token grid (PEG), causal along its first axis.

    x (..., dim) is read as `shape` = (B, T, H, W) in memory order, whatever order its tokens have.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        grid = x.reshape(*shape, x.shape[-1]).movedim(-1, 1)
        grid = F.pad(grid, (1, 1, 1, 1, 2, 0))
        return self.dsconv(grid).movedim(1, -1).reshape(x.shape)


class CosineAttention(nn.Module):
    """Self-attention on unit-norm queries and keys, (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.null_kv = nn.Parameter(torch.empty(heads, 0, head_dim), requires_grad=False)  # dead, and empty
        self.q_scale = nn.Parameter(torch.ones(head_dim))
        self.k_scale = nn.Parameter(torch.ones(head_dim))
        self.norm = LayerNorm(dim)
        self.context_norm = LayerNorm(dim).requires_grad_(False)  # dead
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, relative_bias: Relative | None) -> Tensor:
        q = split_heads(self.to_q(self.norm(x)), self.heads)
        # Quirk: keys and values see x before the norm.
        k, v = (split_heads(y, self.heads) for y in self.to_kv(x).chunk(2, dim=-1))
        out = attention(
            q, k, v, scale=COSINE_SCALE, relative_bias=relative_bias, q_scale=self.q_scale, k_scale=self.k_scale
        )
        return self.to_out(merge_heads(out))


class GEGLU(nn.Module):
    """(..., 2n) -> (..., n): the first half times gelu of the second."""

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


def feed_forward(dim: int) -> nn.Sequential:
    inner = int(4 * 2 / 3 * dim)
    # The published file numbers a dropout, here an identity, between the activation and the last layer.
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, 2 * inner, bias=False),
        GEGLU(),
        nn.Identity(),
        nn.Linear(inner, dim, bias=False),
    )


class Transformer(nn.Module):
    """Residual layers of PEG, attention and feed-forward on (B', L, dim), then a LayerNorm.

    shape is the (B, T, H, W) in which every PEG reads the tokens; relative_bias is `attention`'s.
    """

    def __init__(self, dim: int, layers: int, heads: int, head_dim: int) -> None:
        super().__init__()
        # Names "0", "1", "3" are the published ones; "2" was a cross-attention that this network does not have.
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"0": PositionGenerator(dim), "1": CosineAttention(dim, heads, head_dim), "3": feed_forward(dim)}
            )
            for _ in range(layers)
        )
        self.norm_out = LayerNorm(dim)

    def forward(self, x: Tensor, shape: tuple[int, int, int, int], relative_bias: Relative | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer["0"](x, shape)  # type: ignore[index]
            x = x + layer["1"](x, relative_bias)  # type: ignore[index]
            x = x + layer["3"](x)  # type: ignore[index]
        return self.norm_out(x)


class PositionBias(nn.Module):
    """Continuous relative position bias: an MLP on sign(d)·log(1+|d|) of the 2-D offset between two patches."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(2, dim), nn.LeakyReLU(0.1)),
            nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(0.1)),
            nn.Linear(dim, heads),
        )

    def forward(self, height: int, width: int) -> Relative:
        """The table (heads, offsets) and its grid, as `attention` takes them."""
        weight = next(self.parameters())
        # Only (2h-1)(2w-1) offsets exist: the MLP runs on each once (3 969 rows for 32 x 32, not 1 048 576).
        rows = torch.arange(1 - height, height, device=weight.device)
        columns = torch.arange(1 - width, width, device=weight.device)
        offsets = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).float()
        offsets = offsets.sign() * offsets.abs().log1p()
        return self.net(offsets.flatten(0, 1).to(weight.dtype)).T, (height, width)


class HUNorm(nn.LayerNorm):
    """LayerNorm of the HU in a patch, computed in float32 and returned in the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        # Raw HU reach thousands, where bfloat16 steps by 8 and float16 variances overflow.
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


def patch_embedding(voxels: int, dim: int) -> nn.Sequential:
    """HU patches (..., voxels) -> (..., dim). The published file numbers the reshape into patches as 0."""
    return nn.Sequential(nn.Identity(), HUNorm(voxels), nn.Linear(voxels, dim), nn.LayerNorm(dim))


class VisionTransformer(nn.Module):
    """CT-ViT encoder: raw HU (B, 1, X, Y, Z) -> unit-norm code of every patch.

    Returns tokens (B, T, H, W, dim) and codebook ids (B, T, H, W) int64, where T counts patches along Z, H along X
    and W along Y. Source: Text2CT's CTViT, after GenerateCT (Hamamci et al. 2023).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        dim, area = config.dim, config.patch_size**2
        voxels = area * config.temporal_patch_size
        self.spatial_rel_pos_bias = PositionBias(dim, config.heads)
        self.to_patch_emb_first_frame = patch_embedding(area, dim).requires_grad_(False)  # dead
        self.to_patch_emb = patch_embedding(voxels, dim)
        self.enc_spatial_transformer = Transformer(dim, config.spatial_layers, config.heads, config.head_dim)
        self.enc_temporal_transformer = Transformer(dim, config.temporal_layers, config.heads, config.head_dim)
        self.vq = CosineQuantizer(config.codebook_size, dim)
        # Dead: the decoder's heads, kept so that the published file loads strictly.
        self.to_pixels_first_frame = nn.Sequential(nn.Linear(dim, area)).requires_grad_(False)
        self.to_pixels = nn.Sequential(nn.Linear(dim, voxels)).requires_grad_(False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of 0.02, zero biases, as vision transformers commonly start."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def patches(self, volume: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> (B, T, H, W, voxels), each patch in the order (Z, X, Y)."""
        p, pt = self.config.patch_size, self.config.temporal_patch_size
        x = volume.squeeze(1).unflatten(3, (-1, pt)).unflatten(2, (-1, p)).unflatten(1, (-1, p))
        return x.permute(0, 5, 1, 3, 6, 2, 4).flatten(4)

    def forward(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        x = self.to_patch_emb(self.patches(volume))
        b, t, h, w, dim = shape = x.shape
        grid = (b, t, h, w)
        x = self.enc_spatial_transformer(x.reshape(b * t, h * w, dim), grid, self.spatial_rel_pos_bias(h, w))
        x = x.view(shape).permute(0, 2, 3, 1, 4).reshape(b * h * w, t, dim)
        # Quirk: the tokens now lie in the order (B, H, W, T), yet the PEGs read them as (B, T, H, W).
        x = self.enc_temporal_transformer(x, grid)
        return self.vq(x.view(b, h, w, t, dim).permute(0, 3, 1, 2, 4).contiguous())


def check_volume(volume: Tensor, config: VisionConfig) -> None:
    """volume: (B, 1, image_size, image_size, Z) in HU, Z a positive multiple of temporal_patch_size.

    Floating or integer dtype. Raises TypeError or ValueError.
    """
    if not isinstance(volume, Tensor) or volume.dtype == torch.bool or volume.is_complex():
        got = volume.dtype if isinstance(volume, Tensor) else type(volume).__name__
        raise TypeError(f"volume: wanted a tensor of HU, floating or integer, got {got}")
    size, pt = config.image_size, config.temporal_patch_size
    right = volume.ndim == 5 and volume.shape[0] > 0 and tuple(volume.shape[1:4]) == (1, size, size)
    if not right or volume.shape[4] < 1 or volume.shape[4] % pt:
        raise ValueError(
            f"volume: wanted shape (B, 1, {size}, {size}, Z) with Z a multiple of {pt}, got {tuple(volume.shape)}"
        )
