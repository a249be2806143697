"""What a convolution's weights become when it is folded with a doubling of its input, or turned round for a gradient.

Each form is separable: per axis a matrix (phases, taps, 3) says how the three weights add up to a phase's taps.
"""

from functools import lru_cache

import torch
from torch import Tensor

# y[2i + a] sees x[i - 1 + a + j]: every voxel of x stands for two of the doubled volume.
NEAREST = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))
# y[2i + a] sees x[i - 1 + j]: the doubled volume is 1/4 of one neighbour and 3/4 of the other.
TRILINEAR = (((0.75, 0.25, 0), (0.25, 0.75, 0.75), (0, 0, 0.25)), ((0.25, 0, 0), (0.75, 0.75, 0.25), (0, 0.25, 0.75)))
# Of NEAREST's gradient: x[i] is seen by y[2i - 1 + j].
NEAREST_GRADIENT = (((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0)),)
# Of a stride of 2: x[2i + a] is seen by y[i + (a + padding) // 2 - 1 + j], through the weights of one parity.
EVEN, ODD = ((0, 0, 1), (1, 0, 0)), ((0, 0, 0), (0, 1, 0))


def stride_gradient(padding: int) -> tuple:
    """The matrix for the gradient of a convolution of stride 2: which weights an even and an odd voxel of x meet."""
    return (ODD, EVEN) if padding % 2 else (EVEN, ODD)


@lru_cache(maxsize=32)
def _kept(matrix: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a gradient may want it later
        return torch.tensor(matrix, dtype=dtype, device=device)


def _matrix(matrix: tuple, dtype: torch.dtype, like: Tensor) -> Tensor:
    """`matrix` on like's device. On a GPU it stays there: a copy from the host at every call would wait for it, and no
    CUDA graph could hold it."""
    real = type(like) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return _kept(matrix, dtype, like.device) if real and like.is_cuda else torch.tensor(
        matrix, dtype=dtype, device=like.device)  # fmt: skip


def fold(weight: Tensor, matrix: tuple) -> Tensor:
    """(O, C, 3, 3, 3) -> (phases^3, O, taps^3, C) in weight's dtype, added up in float32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    m = _matrix(matrix, wide, weight)
    w = weight.to(wide).permute(2, 3, 4, 0, 1)
    for _ in range(3):  # the first axis becomes two at the end: after three turns (o, c, phase, tap, phase, tap, ...)
        w = torch.tensordot(w, m, ([0], [2]))
    phases, taps = m.shape[:2]
    w = w.permute(2, 4, 6, 0, 3, 5, 7, 1)
    return w.reshape(phases**3, len(weight), taps**3, weight.shape[1]).to(weight.dtype).contiguous()


def unfold(gradient: Tensor, matrix: tuple) -> Tensor:
    """The adjoint of `fold`: (phases^3, O, taps^3, C) -> (O, C, 3, 3, 3)."""
    m = _matrix(matrix, gradient.dtype, gradient)
    (p, t), (_, o, _, c) = m.shape[:2], gradient.shape
    g = gradient.view(p, p, p, o, t, t, t, c).permute(0, 4, 1, 5, 2, 6, 3, 7)
    for _ in range(3):
        g = torch.tensordot(g, m, ([0, 1], [0, 1]))
    return g


def taps_last(weight: Tensor) -> Tensor:
    """(O, C, K, K, K) -> (1, O, K^3, C); no copy where the weight is channels-last."""
    return weight.permute(0, 2, 3, 4, 1).contiguous().view(1, len(weight), -1, weight.shape[1])


def turned(weight: Tensor) -> Tensor:
    """(O, C, K, K, K) -> (C, O, K, K, K), flipped: the convolution that is the gradient."""
    return weight.flip(2, 3, 4).transpose(0, 1)
