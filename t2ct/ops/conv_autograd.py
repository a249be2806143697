"""conv3d and upsample_conv3d by Triton as operators with gradients: custom ops where something watches, else direct."""

from __future__ import annotations

import torch
from torch import Tensor

from t2ct.ops.dispatch import channels_last, kernel, watched

_conv3d, _conv3d_backward = kernel("conv", "conv3d"), kernel("conv_backward", "conv3d_backward")
_upsample, _upsample_backward = kernel("conv", "upsample_conv3d"), kernel("conv_backward", "upsample_conv3d_backward")


def bias_gradient(dy: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else dy.sum((0, 2, 3, 4), dtype=_wide(dy)).to(bias.dtype)


def channel_bias_gradient(dy: Tensor, channel_bias: Tensor | None) -> Tensor | None:
    return None if channel_bias is None else dy.sum((2, 3, 4), dtype=_wide(dy)).to(channel_bias.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@torch.library.custom_op("t2ct::conv3d", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, channel_bias: Tensor | None,
    stride: int, padding: int,
) -> Tensor:  # fmt: skip
    return _conv3d(x, weight, bias, stride, padding, residual=residual, channel_bias=channel_bias)


@_op.register_fake
def _(x, weight, bias, residual, channel_bias, stride, padding):
    size = [(m + 2 * padding - weight.shape[2]) // stride + 1 for m in x.shape[2:]]
    return channels_last(x.new_empty(len(x), len(weight), *size))


@torch.library.custom_op("t2ct::conv3d_backward", mutates_args=())
def _op_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, upsampled: str
) -> tuple[Tensor, Tensor]:
    if upsampled:
        dx, dw = _upsample_backward(channels_last(dy), x, weight, upsampled)
    else:
        dx, dw = _conv3d_backward(channels_last(dy), x, weight, stride, padding)
    like = torch.empty_like(weight)  # the strides that the fake promises; no copy for channels-last weights
    return dx, dw if dw.stride() == like.stride() else like.copy_(dw)


@_op_backward.register_fake
def _(dy, x, weight, stride, padding, upsampled):
    return channels_last(torch.empty_like(x)), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, bias, residual, channel_bias, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, weight, bias, channel_bias)
    ctx.has_residual = residual is not None


def _gradient(ctx, dy):
    x, weight, bias, channel_bias = ctx.saved_tensors
    dx, dw = _op_backward(dy, x, weight, ctx.stride, ctx.padding, "")
    residual = dy if ctx.has_residual else None
    return dx, dw, bias_gradient(dy, bias), residual, channel_bias_gradient(dy, channel_bias), None, None


_op.register_autograd(_gradient, setup_context=_save)


@torch.library.custom_op("t2ct::upsample_conv3d", mutates_args=())
def _upsample_op(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> Tensor:
    return _upsample(x, weight, bias, mode)


@_upsample_op.register_fake
def _(x, weight, bias, mode):
    return channels_last(x.new_empty(len(x), len(weight), *[2 * m for m in x.shape[2:]]))


def _upsample_gradient(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    return *_op_backward(dy, x, weight, 1, 1, ctx.mode), bias_gradient(dy, bias), None


def _save_upsample(ctx, inputs, output):
    *tensors, ctx.mode = inputs
    ctx.save_for_backward(*tensors)


_upsample_op.register_autograd(_upsample_gradient, setup_context=_save_upsample)


class _Conv3d(torch.autograd.Function):
    """The custom op without its machinery, and only the gradients that are wanted."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, channel_bias, stride, padding):
        _save(ctx, (x, weight, bias, residual, channel_bias, stride, padding), None)
        return _conv3d(x, weight, bias, stride, padding, residual=residual, channel_bias=channel_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias, channel_bias = ctx.saved_tensors
        dx, dw = _conv3d_backward(channels_last(dy), x, weight, ctx.stride, ctx.padding, ctx.needs_input_grad)
        residual = dy if ctx.has_residual else None
        return dx, dw, bias_gradient(dy, bias), residual, channel_bias_gradient(dy, channel_bias), None, None


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mode):
        _save_upsample(ctx, (x, weight, bias, mode), None)
        return _upsample(x, weight, bias, mode)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        gradients = _upsample_backward(channels_last(dy), x, weight, ctx.mode, ctx.needs_input_grad)
        return *gradients, bias_gradient(dy, bias), None


def conv3d(x, weight, bias, residual, channel_bias, stride, padding) -> Tensor:
    """By Triton; x channels-last, all of one dtype; differentiable."""
    residual = None if residual is None else channels_last(residual)
    call = _op if watched(x) else _Conv3d.apply
    return call(x, weight, bias, residual, channel_bias, stride, padding)


def upsample_conv3d(x, weight, bias, mode="nearest") -> Tensor:
    """Doubling and convolution by Triton, folded; x channels-last; differentiable."""
    call = _upsample_op if watched(x) else _Upsample.apply
    return call(x, weight, bias, mode)
