"""What each launch of the Triton kernels does and how long that takes: a model of every row that aot.py compiles.

    python benchmarks/launch_work.py [--markdown docs/kernels-work.md] [--plot docs/roofline.png]

Bytes through memory, bytes from L2 to shared memory (tiles that are read again), matrix operations with the padding of
blocks, special functions. Time: the slowest of them, and of the shorter of matrix operations and special functions the
part that does not hide (kernels/chips.py). Share: what the op cannot do without, its tensors once through memory or its
products at the peak, of that time. No GPU measured any of it. The plot needs matplotlib: pip install t2ct[plots].
"""

import argparse
import os
import re
import sys
from importlib import import_module
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # whose blocks are not a GPU's

from t2ct.kernels.block_plan import conv_seconds  # noqa: E402
from t2ct.kernels.chips import CHIPS, Work  # noqa: E402
from t2ct.kernels.plan import splits_of  # noqa: E402

FAMILIES = ("norm", "conv", "attention", "resample")
SHOWN = (90, 80, 89)
VOXELS = 128 * 128 * 32  # of the result; of the larger volume where sizes differ
B, H, N, M_CROSS = 2, 16, 8192, 77
HALF = 2  # bytes


def up(n: int, block: int) -> int:
    return -(-n // block) * block


def conv(row: dict, at: dict) -> tuple[Work, Work]:
    c, o = map(int, re.findall(r"(\d+) to (\d+)", row["name"])[0])
    rows = VOXELS if at["S"] == 1 else VOXELS // 8
    inputs, taps = VOXELS if at["PHASES"] == 1 else VOXELS // 8, at["K"] ** 3
    blocks, bm = up(o, at["BN"]) // at["BN"], at["TD"] * at["TH"] * at["TW"]
    moved = inputs * c + rows * o * (1 + at["RESIDUAL"] + at["SUMS"]) + at["PHASES"] * taps * c * o
    special = 2.0 * taps * blocks * c * rows * (at["PROLOGUE"] > 1) + 2.0 * rows * o * at["SUMS"]
    l2 = HALF * taps * c * rows * blocks * (1 + at["BN"] / bm)
    done = Work(HALF * moved, 2.0 * taps * c * rows * blocks * at["BN"], special, l2)
    return done, Work(HALF * moved, 2.0 * taps * c * o * rows)


def weight_gradient(row: dict, at: dict) -> tuple[Work, Work]:
    c, o = map(int, re.findall(r"(\d+) to (\d+)", row["name"])[0])
    wide, high, box = up(c, at["BC"]), up(o, at["BO"]), at["TD"] * at["TH"] * at["TW"]
    tiles = 27 * (wide // at["BC"]) * (high // at["BO"])
    splits = splits_of(tiles, VOXELS // box)
    l2 = HALF * tiles * VOXELS * (at["BC"] + at["BO"])
    tensors = HALF * VOXELS * (c + o)
    done = Work(tensors + 2 * 4 * splits * 27 * c * o, 2.0 * 27 * wide * high * VOXELS, 0.0, l2)
    return done, Work(tensors + 4 * 27 * c * o, 2.0 * 27 * c * o * VOXELS)


def passes(row: dict, at: dict) -> tuple[Work, Work] | None:
    """norm's: tensors through memory once each; None for merges, which are as long as their launch."""
    tensors = {"stats_kernel": 1, "apply_kernel": 2, "backward_sums_kernel": 2, "backward_kernel": 3}
    name = row["kernel"].__name__
    if name not in tensors:
        return None
    numbers = VOXELS * int(re.findall(r", (\d+)", row["name"])[-1])
    moved = HALF * tensors[name] * numbers
    return Work(moved, exps=2.0 * numbers * at.get("SILU", False)), Work(moved)


def resample(row: dict, at: dict) -> tuple[Work, Work] | None:
    if at.get("D") == 1:
        return None
    c = int(re.findall(r", (\d+)", row["name"])[-1])
    moved = HALF * c * (VOXELS + VOXELS // 8)
    reads = {"trilinear_kernel": 8, "trilinear_backward_kernel": 64}.get(row["kernel"].__name__, 0)
    return Work(moved, l2=float(HALF * c * reads * (VOXELS // 8))), Work(moved)


def attention(row: dict, at: dict) -> tuple[Work, Work]:
    direction, d = row["name"].split(",")[0], at["BD"]
    m = M_CROSS if direction == "cross" else N
    pairs = B * H * N * m * (0.5 if at["CAUSAL"] else 1)
    products = {"forward": 2, "cross": 2, "dkdv": 4, "dq": 3, "bias": 2}[direction]
    queries, keys = B * H * N * d, B * H * m * d
    tensors = {"forward": (2, 2), "cross": (2, 2), "dkdv": (2, 4), "dq": (3, 2), "bias": (2, 2)}[direction]
    moved = HALF * (tensors[0] * queries + tensors[1] * keys)
    again = {"dkdv": 2 * HALF * d * pairs / at["BN"], "bias": 2 * HALF * d * pairs * (1 / at["BN"] + 1 / at["BM"])}
    l2 = again.get(direction, 2 * HALF * d * pairs / (at["BM"] * at.get("TILES", 1)))
    if at["BIAS"]:
        moved, l2 = moved + HALF * H * N * m, l2 + HALF * pairs
    if at["RELATIVE"]:
        l2 += HALF * pairs
    if direction == "bias":
        moved += 4 * H * N * m if at["BIAS"] else 0
    share = 1 - 0.5 ** at["EXP_SPLIT"] if at.get("EXP_SPLIT") else 1.0
    floor = Work(moved, 2.0 * products * d * pairs)
    return floor + Work(0, exps=share * pairs, l2=l2), floor


def amounts(family: str, row: dict) -> tuple[Work, Work] | None:
    """(what the launch does, what its op cannot do without), or None where there is nothing to model."""
    at = row["constexprs"] | {"num_warps": row["num_warps"]}
    if family == "conv":
        return (conv if "BN" in at else weight_gradient)(row, at)
    return {"norm": passes, "attention": attention, "resample": resample}[family](row, at)


def predictions(family: str) -> dict[str, dict[int, tuple[Work, float, float, str]]]:
    """launch -> capability -> (work, seconds, share of the roofline, slowest level)."""
    found: dict[str, dict[int, tuple[Work, float, float, str]]] = {}
    for arch in SHOWN:
        chip = CHIPS[arch]
        for row in import_module(f"t2ct.kernels.{family}").launches(chip.table):
            amount = amounts(family, row)
            if amount:
                seconds = conv_seconds(chip, amount[0], chip.hidden)
                share = amount[1].seconds(chip) / seconds
                found.setdefault(row["name"], {})[arch] = amount[0], seconds, share, amount[0].bound(chip)
    return found


HEAD = f"""# The kernels, modelled

Made by `python benchmarks/launch_work.py`; arithmetic, no GPU measured any of it. float16; volumes of 128 x 128 x 32
voxels, the larger one where sizes differ; attention with {B} x {H} heads, {N} tokens, {M_CROSS} keys across. L2: tiles
that are read again, by the blocks of H200. Time: the slowest level and what of special functions does not hide. Share:
of the roofline, tensors once through memory or products at the peak; then the slowest level. Launches that merge a few
numbers are as long as a launch is, and left out.

![Roofline](roofline.png)
"""


def page() -> str:
    chips = [CHIPS[arch].name for arch in SHOWN]
    heads = ("launch", "memory MB", "L2 MB", "GFLOP", "special M", *chips)
    lines = [HEAD]
    for family in FAMILIES:
        lines += [f"## kernels/{family}.py\n", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name, by in predictions(family).items():
            work = next(iter(by.values()))[0]
            cells = [f"{work.bytes / 1e6:.0f}", f"{work.l2 / 1e6:.0f}", f"{work.flops / 1e9:.1f}"]
            cells.append(f"{work.exps / 1e6:.0f}")
            cells += [f"{by[a][1] * 1e3:.3g} ms, {by[a][2]:.0%} ({by[a][3]})" if a in by else "" for a in SHOWN]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SHOWN), figsize=(11, 3.6), sharey=True)
    for axis, arch in zip(axes, SHOWN, strict=True):
        chip = CHIPS[arch]
        x = [2.0, chip.flops / chip.bytes, 2.0**16]
        axis.loglog(x, [min(chip.flops, chip.bytes * i) / 1e12 for i in x], color="black", lw=1)
        for family, mark in (("conv", "o"), ("attention", "^")):
            points = [by[arch] for by in predictions(family).values() if arch in by]
            intensity, rate = [w.flops / w.bytes for w, *_ in points], [w.flops / t / 1e12 for w, t, *_ in points]
            axis.loglog(intensity, rate, mark, ms=4, alpha=0.6, label=f"kernels/{family}.py")
        axis.set_title(f"{chip.name}: modelled, not measured", fontsize=9)
        axis.set_xlabel("FLOP per byte of memory")
    axes[0].set_ylabel("TFLOP/s, float16")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="write the page to this file")
    parser.add_argument("--plot", type=Path, help="write the plot to this file")
    args = parser.parse_args()
    text = page()
    print(text, end="")
    if args.markdown:
        args.markdown.write_text(text)
    if args.plot:
        plot(args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
