"""The only door to the kernels: each op checks its input, picks a backend and carries its gradient."""

from t2ct.ops.attention import attention
from t2ct.ops.block import Stats, group_norm_silu_conv3d, group_norm_silu_conv3d_stats
from t2ct.ops.conv import conv3d
from t2ct.ops.dispatch import use_backend
from t2ct.ops.explain import explain, explain_rows
from t2ct.ops.merge import merge_partials
from t2ct.ops.norm import group_apply, group_norm, group_norm_silu, group_stats, merge_stats
from t2ct.ops.resample import average_pool, upsample
from t2ct.ops.upsample_conv import upsample_conv3d

__all__ = ["Stats", "attention", "average_pool", "conv3d", "explain", "explain_rows", "group_apply", "group_norm",
           "group_norm_silu",
           "group_norm_silu_conv3d", "group_norm_silu_conv3d_stats", "group_stats",
           "merge_partials", "merge_stats", "upsample", "upsample_conv3d", "use_backend"]
