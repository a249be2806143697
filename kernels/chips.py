"""What chips can do a second, and how long a given amount of work takes them at least. Arithmetic: nothing is measured.

Peaks are the makers' (dense, float16 with float32 accumulation) except H200's, which are shared measurements of its
matrix units and memory under load. Special functions: 16 a clock and multiprocessor on every chip here. From the L2
cache to shared memory: 30 bytes a clock and multiprocessor, a middle of what is reported, to be measured.
"""

from dataclasses import dataclass
from functools import cache

import torch

LAUNCH = 3e-6  # seconds between a kernel and the next on one stream, with its ramp: assumed


@dataclass(frozen=True)
class Chip:
    """Peaks a second. table: the row of plan.TABLE that serves it. hidden: the share of elementwise work that runs
    behind a matrix product of the same kernel, assumed: warps that issue their own products take turns well (8.x), a
    warp group waits for its asynchronous ones before it rewrites the registers that they read (9.0, 10.0)."""

    name: str
    table: int
    flops: float  # 16-bit products
    flops32: float  # float32, on the FMA units
    bytes: float  # memory
    sms: int
    clock: float
    hidden: float

    @property
    def exps(self) -> float:
        return 16 * self.sms * self.clock

    @property
    def l2(self) -> float:
        return 30 * self.sms * self.clock


CHIPS = {  # by compute capability
    80: Chip("A100", 80, 312e12, 19.5e12, 1.9e12, 108, 1.41e9, 0.75),
    89: Chip("RTX 4090", 80, 165e12, 82.6e12, 1.0e12, 128, 2.52e9, 0.75),
    90: Chip("H200", 90, 790e12, 67e12, 4.3e12, 132, 1.755e9, 0.5),
    100: Chip("B200", 100, 2250e12, 80e12, 8.0e12, 148, 1.85e9, 0.5),
}


@cache
def chip_of(device: torch.device) -> Chip:
    """The chip that stands for a device: consumer chips (8.6, 8.9, 12.0) have matrix units slow beside their special
    functions and little bandwidth, as the RTX 4090; a CPU, where kernels are only interpreted, the A100."""
    if device.type != "cuda":
        return CHIPS[80]
    major, minor = torch.cuda.get_device_capability(device)
    return CHIPS[{9: 90, 10: 100}.get(major, 80 if (major, minor) == (8, 0) else 89)]


@dataclass(frozen=True)
class Work:
    """Bytes through memory and from L2 to shared memory, 16-bit and float32 matrix operations, special functions."""

    bytes: float
    flops: float = 0.0
    exps: float = 0.0
    l2: float = 0.0
    flops32: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Work(*(a + b for a, b in pairs))

    def times(self, chip: Chip) -> dict[str, float]:
        """Seconds of each level alone."""
        matrix = self.flops / chip.flops + self.flops32 / chip.flops32
        return {"memory": self.bytes / chip.bytes, "matrix": matrix, "exp": self.exps / chip.exps,
                "L2": self.l2 / chip.l2}  # fmt: skip

    def seconds(self, chip: Chip) -> float:
        """The slowest level, the others hidden behind it: no kernel is faster."""
        return max(self.times(chip).values())

    def bound(self, chip: Chip) -> str:
        times = self.times(chip)
        return max(times, key=lambda level: times[level])
