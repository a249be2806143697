"""merge_partials: the statistics of tiles of voxels merged into those of groups of channels."""

import torch
from torch import Tensor

from t2ct.ops.dispatch import choose, native, watched


def _cuda(mean: Tensor, m2: Tensor, count: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    out = mean.new_empty((mean.shape[0], groups))
    rstd = torch.empty_like(out)
    native().merge_stats((*mean.shape, groups), mean.data_ptr(), m2.data_ptr(), count.data_ptr(), eps, out.data_ptr(),
                         rstd.data_ptr(), mean.device.index, torch.cuda.current_stream(mean.device).cuda_stream)
    return out, rstd


def _reference(mean: Tensor, m2: Tensor, count: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    n, tiles, channels = mean.shape
    voxels = count.double().clamp_min(0).view(1, tiles, 1, 1)
    means, squares = (t.double().view(n, tiles, groups, -1).where(voxels > 0, 0) for t in (mean, m2))
    total = voxels.sum() * (channels // groups)
    average = (voxels * means).sum((1, 3)) / total
    variance = (squares + voxels * (means - average[:, None, :, None]).square()).sum((1, 3)) / total
    return average.float(), (variance + eps).rsqrt().float()


MERGE = {"cuda": _cuda, "reference": _reference}
TABLES = {"merge_partials": MERGE}


@torch.library.custom_op("t2ct::merge_partials", mutates_args=())
def _merge(mean: Tensor, m2: Tensor, count: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    mean, m2, count = mean.contiguous(), m2.contiguous(), count.contiguous()
    return choose("merge_partials", MERGE, mean)[1](mean, m2, count, groups, eps)


@_merge.register_fake
def _(mean, m2, count, groups, eps):
    return mean.new_empty((mean.shape[0], groups)), mean.new_empty((mean.shape[0], groups))


def merge_partials(mean: Tensor, m2: Tensor, count: Tensor, groups: int, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The statistics of GroupNorm from those of tiles, as a kernel writes them while it makes a tensor. No gradient.

    mean, m2  (N, T, C) float32: mean and sum((x - mean)^2) of every channel over each of T tiles of voxels
    count     (T,) float32: voxels in each tile; a tile of 0 voxels is skipped, whatever it holds
    groups    C is a multiple of it
    Returns   mean and rstd = (M2 / count + eps) ** -0.5, float32 (N, groups); NaN where no tile has a voxel.
    Raises    ValueError on a bad shape or device, TypeError where a tensor is not float32.
    Sums are taken in double, by the CUDA kernel in an order that depends on the shape alone: same input, same bits.
    """
    if mean.dim() != 3 or groups < 1 or mean.shape[2] % groups or not mean.numel():
        raise ValueError(f"merge_partials: mean must be non-empty, (N, T, C), C a multiple of groups={groups}, "
                         f"got {tuple(mean.shape)}")
    for name, t, shape in (("m2", m2, mean.shape), ("count", count, mean.shape[1:2])):
        if t.shape != shape or t.device != mean.device:
            raise ValueError(f"merge_partials: {name} must be {tuple(shape)} on {mean.device}, "
                             f"got {tuple(t.shape)} on {t.device}")
    for name, t in (("mean", mean), ("m2", m2), ("count", count)):
        if t.dtype != torch.float32:
            raise TypeError(f"merge_partials: {name} must be torch.float32, got {t.dtype}")
    if watched(mean):
        return _merge(mean, m2, count, groups, eps)
    mean, m2, count = (t.detach().contiguous() for t in (mean, m2, count))
    return choose("merge_partials", MERGE, mean)[1](mean, m2, count, groups, eps)
