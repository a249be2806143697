"""3x3x3 convolutions of a UNet's deep levels, nearest doubling followed by one, small float32 volumes, for which torch
does not ask oneDNN, and large ones, which Winograd's filtering serves: torch against t2ct.ops.

Work model: weights read once, x read and y written once; 2 * 27 operations a weight and voxel, whatever a form saves.
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from t2ct.ops import conv3d, conv_cpu, upsample_conv3d, use_backend

# (C, X, Y, Z), outputs: levels 3 and 2 of the published UNet at 32 x 32 x 16 latents; what it doubles there
CONVS = (((512, 4, 4, 2), 512), ((1024, 4, 4, 2), 512), ((256, 8, 8, 4), 256), ((768, 8, 8, 4), 256))
DOUBLED = (((128, 16, 16, 8), 128), ((256, 8, 8, 4), 256), ((128, 32, 32, 16), 128))
SMALL = (((16, 10, 96, 48), 16), ((80, 12, 12, 6), 80), ((4, 24, 24, 12), 64), ((96, 6, 6, 3), 96), ((64, 8, 8, 4), 64))
LARGE = (((64, 64, 64, 64), 64), ((128, 32, 32, 16), 128), ((256, 32, 32, 32), 128), ((64, 32, 32, 16), 64),
         ((128, 16, 16, 8), 128), ((16, 96, 96, 48), 16), ((256, 16, 16, 16), 256))  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def doubled(x, w, b):
    return F.conv3d(F.interpolate(x, scale_factor=2.0, mode="nearest"), w, b, padding=1)


def forced(backend, op):
    def call(*args):
        with use_backend(backend):
            return op(*args)

    return call


FORMS = {
    "conv3d": {"torch": lambda x, w, b: F.conv3d(x, w, b, padding=1), "cpu": forced("cpu", conv3d)},
    "small_conv3d": {"torch": lambda x, w, b: F.conv3d(x, w, b, padding=1), "cpu": conv3d},
    "large_conv3d": {"torch": lambda x, w, b: F.conv3d(x, w, b, padding=1), "cpu": conv3d},
    "upsample_conv3d": {"torch": doubled, "cpu": upsample_conv3d},
}
CASES = [("conv3d", *c) for c in CONVS] + [("upsample_conv3d", *c) for c in DOUBLED]
CASES = [(*case, dtype) for case in CASES for dtype in DTYPES] + [("small_conv3d", *c, torch.float32) for c in SMALL]
CASES += [("large_conv3d", *c, torch.float32) for c in LARGE]


@functools.lru_cache(maxsize=1)
def inputs(op, shape, outputs, dtype, device):
    torch.manual_seed(0)
    c, *size = shape
    x = torch.randn(1, c, *size, device=device).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    w = (torch.randn(outputs, c, 3, 3, 3, device=device) / (27 * c) ** 0.5).to(dtype)
    b = torch.randn(outputs, device=device).to(dtype)
    y = FORMS[op]["torch"](x.double(), w.double(), b.double())
    copies = max(1, int(80e6 / w.nbytes))  # a network never finds the weights in the cache that its last pass left
    return x, [w.clone() for _ in range(copies)], b, y


@pytest.mark.parametrize("form", ("torch", "cpu"))
@pytest.mark.parametrize("op,shape,outputs,dtype", CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_conv(form, op, shape, outputs, dtype, device, measure, benchmark):
    x, weights, b, y = inputs(op, shape, outputs, dtype, device)
    reason = conv_cpu.refusal(x) if form == "cpu" and op == "conv3d" else None
    if reason:
        pytest.skip(reason)
    benchmark.group = f"{op} {shape} -> {outputs} {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info["peer"] = form
    turn = itertools.cycle(weights)
    nbytes = x.nbytes + weights[0].nbytes + y.numel() * x.element_size()
    flops = 2 * weights[0][0].numel() * y.numel()
    with torch.no_grad():
        measure(lambda: (FORMS[op][form](x, next(turn), b),), (y,), nbytes, flops, TOLERANCE[dtype])
