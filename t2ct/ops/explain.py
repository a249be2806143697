"""Which backend every op uses on this machine, and why."""

import torch

from t2ct.kernels import block_plan
from t2ct.kernels.chips import CHIPS
from t2ct.ops import conv, merge, norm, norm_cpu, resample, upsample_conv
from t2ct.ops.attention import TABLES as ATTENTION
from t2ct.ops.attention import why_not_attention
from t2ct.ops.dispatch import UNPROVEN, candidates, forced, native, why_not

PLANNED_SIZES, PLANNED_WIDTHS = ((16, 16, 4), (128, 128, 32), (512, 512, 128)), (64, 128, 256, 512)
TABLES = {**norm.TABLES, **conv.TABLES, **upsample_conv.TABLES, **merge.TABLES, **resample.TABLES, **ATTENTION}
NOTES = {**conv.NOTES, **upsample_conv.NOTES}


def explain_rows(device: str | torch.device | None = None) -> list[tuple[str, str, str, str]]:
    """(device, op, backend, reason) for every op on `device`, or on every device of this machine; for float32 tensors
    in channels-last memory. The backend is "none" where a forced one cannot run."""
    if device is not None and str(device).partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: wanted cpu or cuda, got {str(device)!r}")
    devices = [torch.device(device).type] if device else ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return [(kind, op, *_why(op, table, kind)) for kind in devices for op, table in TABLES.items()]


def _why(op, table, device):
    tried = candidates(table)
    refused = [] if tried == tuple(table) else [f"{tried[0]} is forced"]
    for backend in tried:
        ask = why_not_attention if op == "attention" else why_not
        reason = ask(backend, device, torch.float32) or (None if backend == forced() else UNPROVEN.get(backend))
        if reason is None:
            if device == "cpu" and backend != "reference":  # that GPU backends want a GPU is no news
                refused = [r for r in refused if "forced" in r]
            return backend, "; ".join(refused) or NOTES.get((op, backend), "{what}").format(what=_what(backend))
        refused.append(f"{backend}: {reason}")
    return "none", "; ".join(refused)


def _what(backend):
    if backend == "cpu":
        threads = torch.get_num_threads()
        return f"compiled, {native().isas()[norm_cpu.ISA]}, {threads} thread{'s' * (threads != 1)}"
    if backend == "cuda":
        return f"compiled for {', '.join(native().cuda_targets)}"
    return "torch's scaled_dot_product_attention" if backend == "sdpa" else "plain torch"


def plan_rows() -> list[tuple[str, ...]]:
    """(chip, voxels, one cell for each of PLANNED_WIDTHS): what group_norm_silu_conv3d does under Triton in float16.

    apply or prologue: the norm in a pass of its own, or where the convolution loads its input; its time against the
    other's by the model in kernels/block_plan.py. Then what is fused besides: statistics of the result into the
    convolution (stats), sums of the norm's gradient into the convolution's gradient (sums).
    """
    rows = []
    for arch, chip in CHIPS.items():
        for size in PLANNED_SIZES:
            cells = (_planned(chip, size[0] * size[1] * size[2], c) for c in PLANNED_WIDTHS)
            rows.append((f"sm_{arch} ({chip.name})", " x ".join(map(str, size)), *cells))
    return rows


def _planned(chip, voxels, c):
    way, stats = block_plan.forward(chip, torch.float16, voxels, c, c, True)
    other = "apply" if way == "prologue" else "prologue"
    mine, theirs = (block_plan.forward_seconds(chip, torch.float16, voxels, c, c, w, stats) for w in (way, other))
    fused = ["stats"] * stats + ["sums"] * block_plan.gradient(chip, torch.float16, voxels, c, c)
    return " ".join((way, f"{mine / theirs:.2f}", *fused))


def _table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = ([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def explain(device: str | torch.device | None = None) -> str:
    """A table of device, op, backend and the reason, one op a line, see `explain_rows`; then, for every chip that there
    is a model of, how group_norm_silu_conv3d would run by Triton, see `plan_rows`."""
    heads = ("chip", "voxels", *(f"{c} channels" for c in PLANNED_WIDTHS))
    return (
        _table([("device", "op", "backend", "reason"), *explain_rows(device)])
        + "\n\ngroup_norm_silu_conv3d by Triton, float16: a model's choice, its time to the other way's; not measured\n"
        + _table([heads, *plan_rows()])
    )
