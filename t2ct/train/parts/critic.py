"""The VAE's two judges: a critic that learns (LSGAN), and distances between features that need no learning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2ct.ops.conv_gradient import narrow


class Critic(nn.Module):
    """A patch critic (Isola et al. 2017), in MAISI's sizes: (B, 1, X, Y, Z) -> (B, 1, X', Y', Z') opinions.

    A first layer, `layers` - 1 further that halve the volume, one that does not, one that judges; convolutions of 4³,
    instance norm, leaky ReLU.
    """

    def __init__(self, channels: int = 32, layers: int = 3):
        super().__init__()
        width, blocks = channels, [nn.Conv3d(1, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            wider = channels * min(2**i, 8)
            conv = nn.Conv3d(width, wider, 4, 2 if i < layers else 1, 1, bias=False)
            blocks += [conv, nn.InstanceNorm3d(wider), nn.LeakyReLU(0.2)]
            width = wider
        self.net = nn.Sequential(*blocks, nn.Conv3d(width, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            if isinstance(layer, nn.Conv3d) and narrow(x, (n - 1 for n in x.shape[2:])):
                with torch.autocast("cpu", enabled=False):
                    x = layer(x.float())
            else:
                x = layer(x)
        return x


class RandomFeatures(nn.Module):
    """Perceptual distance in the features of fixed random convolutions, the same on every machine.

    Four levels of orthogonal 3³ filters, each seeing twice as far; features of unit length at every voxel, as LPIPS
    compares them (Zhang et al. 2018). Networks with random weights already tell textures and edges apart well enough
    to synthesise them (Ustyuzhaninov et al. 2017), and no trained network of chest CT comes without a download.
    """

    def __init__(self, channels: tuple[int, ...] = (16, 32, 64, 64), seed: int = 1):
        super().__init__()
        generator, width = torch.Generator().manual_seed(seed), 1
        self.filters = nn.ParameterList()
        for out in channels:
            noise = torch.randn(out, width * 27, generator=generator)
            longer = max(noise.shape)
            basis = torch.linalg.qr(torch.randn(longer, min(noise.shape), generator=generator)).Q
            weight = (basis if noise.shape[0] == longer else basis.T) * (2.0 * max(1.0, out / (27 * width))) ** 0.5
            if width == 1:
                weight = weight - weight.mean(1, keepdim=True)  # brightness is L1's affair
            self.filters.append(nn.Parameter(weight.reshape(out, width, 3, 3, 3).contiguous(), requires_grad=False))
            width = out

    def features(self, x: Tensor) -> list[Tensor]:
        """One map per level, of unit length at every voxel."""
        maps, h = [], x
        for i, weight in enumerate(self.filters):
            h = F.leaky_relu(F.conv3d(h if i == 0 else F.avg_pool3d(h, 2), weight, padding=1), 0.1)
            maps.append(h / (h.square().sum(1, keepdim=True) + 1e-4).sqrt())
            if min(h.shape[2:]) < 4:
                break
        return maps

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean over the levels of the mean squared distance; x, y (B, 1, X, Y, Z) in [0, 1]."""
        with torch.no_grad():
            wanted = self.features(x)
        distances = [(a - b).square().sum(1).mean() for a, b in zip(wanted, self.features(y), strict=True)]
        return torch.stack(distances).mean()
