"""Measure launches of the convolution on the GPU at hand and print rows for TABLE in kernels/plan.py.

    python benchmarks/tune.py

Each width's candidates are proven against torch first, then take turns; the fastest is printed with its time.
"""

import itertools
import statistics
import sys

import torch
import torch.nn.functional as F
from t2ct.kernels import conv, plan
from tqdm import tqdm

WIDTHS = ((32, 16, 64), (64, 64, 64), (128, 128, 32), (1 << 30, 256, 16))  # columns up to, channels, edge of the volume


def candidates(width: int):
    # Where there are fewer columns or channels than a block's least, the block is as narrow as they are and some of its
    # warps idle; without those a width of 16 would have no candidate.
    columns, deep = ({min(width, n) for n in sizes} for sizes in ((16, 64, 128, 256), (32, 64)))
    for bm, bk, warps, stages in itertools.product((64, 128, 256), sorted(deep), (4, 8), (2, 3, 4)):
        for bn in sorted(columns):
            if bm * bn <= 128 * 256 and bm * bn >= min(1024 * warps, 64 * width):
                yield plan.Launch(bm, bn, bk, warps, stages, tma=plan.architecture(torch.device("cuda", 0)) >= 90)


def seconds(fn) -> float:
    times = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        fn()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def main() -> int:
    if not torch.cuda.is_available():
        print("tune.py measures on a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    arch = plan.architecture(torch.device("cuda", 0))
    print(f"# {torch.cuda.get_device_name()}: rows of TABLE[{arch}]")
    for most, c, edge in WIDTHS:
        x = torch.randn(1, c, edge, edge, edge, device="cuda", dtype=torch.float16)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        w = torch.randn(c, c, 3, 3, 3, device="cuda", dtype=torch.float16) / (27 * c) ** 0.5
        exact = F.conv3d(x.float(), w.float(), padding=1)
        found = []
        for at in tqdm(list(candidates(c)), desc=f"{c} channels"):
            conv.launch = lambda *_, at=at, **__: at
            try:
                y = conv.conv3d(x, w)
            except Exception as error:  # out of shared memory or registers: no candidate
                tqdm.write(f"{at}: {type(error).__name__}")
                continue
            if (y.float() - exact).norm() > 3e-3 * exact.norm():
                tqdm.write(f"{at}: WRONG")
                continue
            found.append((seconds(lambda x=x, w=w: conv.conv3d(x, w)), at))
        best, at = min(found, key=lambda f: f[0])
        rate = 2 * 27 * c * c * edge**3 / best / 1e12
        print(f"        ({most}, {at}),  # {best * 1e3:.3f} ms, {rate:.0f} TFLOP/s at {c} channels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
