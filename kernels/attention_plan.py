"""How the attention kernels are launched: a function of architecture, head dim and direction, no tuning at run time."""

MAX_ONE_BLOCK = {2: 128, 4: 32}  # bytes of a number -> keys that one block holds

# (direction, architecture) -> {padded head dim up to: (queries, keys of a block, warps, stages)}. Reasoned and compiled
# (no spills, see `launches`), not measured.
BLOCKS = {
    ("forward", 80): {32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 2)},
    ("forward", 90): {32: (64, 128, 4, 2), 64: (128, 128, 8, 3), 128: (128, 128, 8, 2)},
    ("forward", 100): {32: (128, 128, 8, 3), 64: (128, 128, 8, 3), 128: (128, 128, 8, 2)},
    ("cross", 80): {128: (64, 128, 4, 2)},
    ("dkdv", 80): {32: (64, 128, 8, 2), 64: (32, 64, 4, 2), 128: (32, 128, 8, 2)},
    ("dkdv", 90): {64: (64, 128, 8, 2), 128: (32, 128, 8, 2)},
    ("dkdv", 100): {64: (64, 128, 8, 2), 128: (32, 64, 4, 2)},
    ("dq", 80): {32: (128, 64, 4, 2), 64: (128, 64, 8, 2), 128: (128, 32, 8, 2)},
    ("bias", 80): {64: (64, 32, 4, 2), 128: (32, 64, 8, 1)},
    ("bias", 90): {64: (64, 64, 4, 2), 128: (64, 32, 8, 1)},
    ("bias", 100): {32: (64, 32, 4, 2), 64: (64, 64, 4, 2), 128: (64, 32, 8, 1)},
}  # fmt: skip
# With a bias every logit has an address or two besides: fewer logits a thread. Eight warps take 128 rows of logits:
# with fewer they compute the same softmax twice.
BIASED = {
    ("forward", 80): {64: (128, 64, 8, 2), 128: (128, 32, 8, 2)},
    ("forward", 90): {64: (128, 64, 8, 2), 128: (128, 64, 8, 1)},
    ("forward", 100): {64: (128, 64, 8, 2), 128: (128, 64, 8, 1)},
    ("cross", 80): {32: (64, 128, 4, 2), 64: (128, 128, 8, 2), 128: (64, 128, 4, 1)},
    ("cross", 90): {32: (64, 128, 4, 2), 64: (128, 128, 8, 2), 128: (128, 128, 8, 1)},
    ("cross", 100): {64: (128, 128, 8, 2), 128: (128, 128, 8, 1)},
    ("dkdv", 80): {32: (32, 64, 4, 2), 64: (16, 64, 4, 2), 128: (32, 64, 8, 2)},
    ("dkdv", 90): {64: (32, 64, 4, 2), 128: (16, 64, 4, 2)},
    ("dkdv", 100): {32: (64, 64, 4, 2), 64: (32, 64, 4, 2), 128: (16, 64, 4, 2)},
    ("dq", 80): {32: (64, 64, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 4, 1)},
    ("dq", 90): {64: (128, 64, 8, 2), 128: (64, 32, 4, 1)},
    ("dq", 100): {64: (128, 64, 8, 2), 128: (64, 32, 4, 1)},
}  # fmt: skip
FLOAT32 = {32: (32, 32, 4, 1), 64: (32, 32, 8, 1), 128: (32, 16, 8, 1)}  # full products run on the FMA units
FLOAT32_NARROW = FLOAT32 | {64: (16, 32, 4, 1), 128: (16, 16, 8, 1)}  # gradients that hold more beside the products


def config(arch: int, head_dim: int, direction: str, itemsize: int = 2, biased: bool = False) -> dict[str, int]:
    """Launch parameters of a direction: "forward", "cross", "dkdv", "dq" or "bias" (gradients); head_dim up to 128."""
    book = BIASED if biased and direction != "bias" else BLOCKS
    table = book.get((direction, arch)) or book[direction, 80]
    if itemsize > 2:
        table = FLOAT32_NARROW if direction in ("dq", "bias") else FLOAT32
    bm, bn, warps, stages = next(row for limit, row in table.items() if head_dim <= limit)
    if direction == "cross":
        bn = MAX_ONE_BLOCK[itemsize]
    return {"BM": bm, "BN": bn, "num_warps": warps, "num_stages": stages}
