"""Which backend every op uses on this machine, and why."""

import torch

from t2ct.ops import conv, merge, norm, norm_cpu, resample
from t2ct.ops.attention import TABLES as ATTENTION
from t2ct.ops.attention import why_not_attention
from t2ct.ops.dispatch import UNPROVEN, candidates, forced, native, why_not

TABLES = {**norm.TABLES, **conv.TABLES, **merge.TABLES, **resample.TABLES, **ATTENTION}


def explain_rows(device: str | torch.device | None = None) -> list[tuple[str, str, str, str]]:
    """(device, op, backend, reason) for every op on `device`, or on every device of this machine; for float32 tensors
    in channels-last memory. The backend is "none" where a forced one cannot run."""
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
            return backend, "; ".join(refused) or conv.NOTES.get((op, backend), "{what}").format(what=_what(backend))
        refused.append(f"{backend}: {reason}")
    return "none", "; ".join(refused)


def _what(backend):
    if backend == "cpu":
        threads = torch.get_num_threads()
        return f"compiled, {native().isas()[norm_cpu.ISA]}, {threads} thread{'s' * (threads != 1)}"
    if backend == "cuda":
        return f"compiled for {', '.join(native().cuda_targets)}"
    return "torch's scaled_dot_product_attention" if backend == "sdpa" else "plain torch"


def explain(device: str | torch.device | None = None) -> str:
    """A table of device, op, backend and the reason, one op a line; see `explain_rows`."""
    rows = [("device", "op", "backend", "reason"), *explain_rows(device)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]] for row in rows)
    return "\n".join("  ".join(line) for line in lines)
