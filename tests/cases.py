"""One row per differentiable op: its definition in plain torch, its table of backends, and inputs worth trying."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from t2ct.ops import norm


@dataclass(frozen=True)
class Case:
    name: str
    op: Callable  # the public function
    raw: Callable  # the custom op, for opcheck
    options: tuple  # what the custom op takes after the public function's arguments
    table: Mapping[str, Callable]
    definition: Callable  # plain torch, evaluated in float64
    make: Callable  # (shape, dtype, device) -> (tensors, constants); the first tensor is laid out by the test
    shapes: tuple


def norm_inputs(shape, dtype, device):
    c = shape[1]
    x = 2 * torch.randn(shape, device=device) + 3  # a mean far from 0
    groups = next(g for g in (4, 3, 2, 1) if c % g == 0)
    return [t.to(dtype) for t in (x, torch.randn(c, device=device), torch.randn(c, device=device))], (groups, 1e-6)


# Channels that fill vectors, that do not, that leave a tail, one voxel, one number; several blocks of voxels; 3-D, 4-D.
NORM_SHAPES = ((2, 8, 3, 5, 7), (1, 32, 9, 9, 9), (1, 1, 1, 1, 11), (3, 6, 1, 1, 2), (2, 21, 4, 3, 5), (1, 64, 1, 1, 1),
               (2, 48, 12, 11, 13), (1, 12, 7), (2, 16, 6, 5))

CASES = (
    Case("group_norm", norm.group_norm, norm._forward, (False,), norm.FORWARD,
         lambda x, w, b, g, eps: F.group_norm(x, g, w, b, eps), norm_inputs, NORM_SHAPES),
    Case("group_norm_silu", norm.group_norm_silu, norm._forward, (True,), norm.FORWARD,
         lambda x, w, b, g, eps: F.silu(F.group_norm(x, g, w, b, eps)), norm_inputs, NORM_SHAPES),
)
