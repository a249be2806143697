"""The convolution's launches that benchmarks/aot.py compiles."""

import torch
from t2ct.kernels.conv import conv_kernel, weight_gradient_kernel
from t2ct.kernels.plan import box, launch

SIZES = ((64, 64), (128, 128), (256, 256), (512, 512))  # channels of the published networks, in and out


def launches(arch: int):
    """What benchmarks/aot.py compiles: every row of the launch table, forward, fused, folded and both gradients."""
    ints = dict.fromkeys(("D", "H", "W", "C", "YD", "YH", "YW", "O", "tiles_d", "tiles_h", "tiles_w",
                          "groups"), "i32")
    pointers = dict.fromkeys(("bias", "channel_bias", "residual", "y", "n_weight", "n_bias"), "*fp16")
    pointers |= dict.fromkeys(("n_mean", "n_rstd", "mean", "m2", "count"), "*fp32")
    forms = {
        "conv": {},
        "conv, statistics": {"RESIDUAL": True, "CHANNEL_BIAS": True, "STATS": True},
        "conv, normalised on the way in": {"PROLOGUE": 2},
        "gradient behind a norm": {"SUMS": True, "BIAS": False},
        "conv, stride 2": {"S": 2, "PAD0": 0, "PAD1": 0},
        "nearest x2, conv": {"K": 2, "PAD1": 0, "PHASES": 8},
        "trilinear x2, conv": {"PHASES": 8, "CLAMP": True},
    }
    for c, o in SIZES:
        for name, form in forms.items():
            at = launch(arch, torch.float16, c, o, stats="STATS" in form, sums="SUMS" in form)
            dims = dict(zip(("TD", "TH", "TW"), box((64, 64, 64), at.bm), strict=True))
            shape = ", ".join(map(str, (1, *dims.values(), at.bk)))
            tma = at.tma and not form.get("CLAMP") and form.get("S", 1) == 1
            kinds = (f"tensordesc<fp16[{shape}]>", f"tensordesc<fp16[{at.bn}, {at.bk}]>") if tma else ("*fp16",) * 2
            constants = {"K": 3, "S": 1, "PAD0": 1, "PAD1": 1, "PHASES": 1, "CLAMP": False, "PROLOGUE": 0, "BIAS": True}
            constants |= dict.fromkeys(("CHANNEL_BIAS", "RESIDUAL", "STATS", "SUMS"), False)
            constants |= {"TMA": tma, "EVEN_C": True, **dims, "BN": at.bn, "BK": at.bk, **form}
            yield {
                "name": f"{name}, {c} to {o}",
                "kernel": conv_kernel,
                "signature": {"x": kinds[0], "weight": kinds[1]} | pointers | ints,
                "constexprs": constants,
                "num_warps": at.warps,
                "num_stages": at.stages,
                "divisible": ["C", "O", *pointers, *(() if tma else ("x", "weight"))],
            }
        at = launch(arch, torch.float16, c, o, gradient=True)
        dims = dict(zip(("TD", "TH", "TW"), box((64, 64, 64), at.bk), strict=True))
        yield {
            "name": f"weight gradient, {c} to {o}",
            "kernel": weight_gradient_kernel,
            "signature": {"x": "*fp16", "dy": "*fp16", "partial": "*fp32", "N": "i32"} | ints | {"splits": "i32"},
            "constexprs": {"K": 3, "S": 1, "PAD0": 1, "PAD1": 1, "PHASES": 1, **dims, "BO": at.bm, "BC": at.bn},
            "num_warps": at.warps,
            "num_stages": at.stages,
            "divisible": ["C", "O", "x", "dy", "partial"],
        }
