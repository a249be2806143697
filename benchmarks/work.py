"""What an op must do at least (bytes through memory, matrix operations, exponentials) and how long chips need for that.

    python benchmarks/work.py     prints the tables of docs/kernels.md

Peaks are in kernels/chips.py.
"""

from t2ct.kernels.chips import CHIPS as BY_CAPABILITY
from t2ct.kernels.chips import Work

from t2ct.ops.explain import PLANNED_WIDTHS, plan_rows

CHIPS = {BY_CAPABILITY[arch].name: BY_CAPABILITY[arch] for arch in (90, 80, 89)}


def norm_silu(shape, itemsize: int, gradient: bool = False) -> Work:
    """Forward: x read twice, y written. Gradient: x and dy read twice, dx written; silu again."""
    n = 1
    for m in shape:
        n *= m
    forward = Work(3 * n * itemsize, exps=2 * n)
    return forward + Work(5 * n * itemsize, exps=2 * n) if gradient else forward


def conv(shape, outputs: int, itemsize: int, taps: int = 27, gradient: bool = False) -> Work:
    """x and weights read, y written, once; two operations a weight and voxel. Gradient: the same twice more."""
    n, c, *size = shape
    voxels = n
    for m in size:
        voxels *= m
    weights = taps * c * outputs
    forward = Work((voxels * (c + outputs) + weights) * itemsize, 2.0 * voxels * weights)
    return Work(3 * forward.bytes, 3 * forward.flops) if gradient else forward


def attention(b: int, h: int, n: int, d: int, itemsize: int, gradient: bool = False, biased: bool = False) -> Work:
    """q, k, v, out once; four operations a score and dimension, one exponential a score. Gradient: 2.5 times more.
    biased: a bias (1, h, n, n) is read; for the gradient once more, and its own is written."""
    forward = Work(4.0 * b * h * n * d * itemsize, 4.0 * b * h * n * n * d, float(b * h * n * n))
    bias = Work(float(h * n * n * itemsize * (3 if gradient else 1))) if biased else Work(0.0)
    return bias + forward + Work(2 * forward.bytes, 2.5 * forward.flops, forward.exps) if gradient else bias + forward


def main() -> None:
    rows = {}
    for c, size in ((64, (512, 512, 128)), (64, (256, 256, 64)), (128, (256, 256, 64)), (256, (128, 128, 32)),
                    (512, (128, 128, 32))):  # fmt: skip
        shape = (1, c, *size)
        rows[f"GN + SiLU + conv, {c} channels, {' x '.join(map(str, size))}"] = conv(shape, c, 2) + Work(
            norm_silu(shape, 2).bytes
        )
    rows["GN + SiLU, 64 channels, 256 x 256 x 64"] = norm_silu((1, 64, 256, 256, 64), 2)
    for n in (8192, 131072):
        rows[f"attention, 2 x 16 heads of 32, {n} tokens"] = attention(2, 16, n, 32, 2)
    print("| float16, forward | " + " | ".join(CHIPS) + " |\n|---" + "|---" * len(CHIPS) + "|")
    for name, amount in rows.items():
        cells = (f"{amount.seconds(chip) * 1e3:.3g} ms ({amount.bound(chip)})" for chip in CHIPS.values())
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| chip | voxels | " + " | ".join(f"{c} channels" for c in PLANNED_WIDTHS) + " |\n|---" + "|---" * 5 + "|")
    for row in plan_rows():
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
