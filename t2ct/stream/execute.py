"""Run a network over a volume inside a memory budget: plan, then carry out, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from t2ct.ops.dispatch import channels_last, why_not
from t2ct.stream.budget import free_memory, parse_bytes
from t2ct.stream.graph import Graph, Node
from t2ct.stream.plan import Plan, make_plan
from t2ct.stream.run import Run, planes_of
from t2ct.stream.spool import check_folder

Budget = str | int | float | None


def plan_for(
    nodes: Sequence[Node],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
    memory_budget: Budget = None,
    spool_dir: str | Path | None = None,
    output_itemsize: int | None = None,
) -> Plan:
    """The plan for x of `shape` (N, C, X, Y, Z): see `execute`. ValueError where no plan fits the budget."""
    device = torch.device(device)
    generic = device.type != "cuda" and why_not("cpu", "cpu", dtype) is not None
    graph = Graph(tuple(nodes), tuple(shape[2:]), dtype.itemsize, device.type, generic)  # type: ignore[arg-type]
    itemsize = output_itemsize or dtype.itemsize
    budget = free_memory(device) if memory_budget is None else parse_bytes(memory_budget)
    # The results of the other samples of the batch are there as well.
    others = (shape[0] - 1) * graph.costs[-1].bytes // graph.itemsize * itemsize
    spool = device.type == "cuda" or check_folder(spool_dir) is not None
    return make_plan(graph, max(1, budget - others), spool, itemsize)


@torch.no_grad()
def execute(
    nodes: Sequence[Node],
    parameters: Mapping[str, Tensor],
    x: Tensor,
    memory_budget: Budget = None,
    spool_dir: str | Path | None = None,
    convert: Callable[[Tensor], Tensor] | None = None,
    output_dtype: torch.dtype | None = None,
    step: Callable[[int], None] | None = None,
) -> Tensor:
    """The network's output for x, the same bits whatever the budget.

    nodes, parameters  the network; parameters in x's dtype
    x                  (N, C, X, Y, Z), float32, bfloat16 or float16
    memory_budget      bytes, or "6GB": all that is allocated, the result included; None: what the device has free
    spool_dir          a folder for files, so that on a CPU tensors may lie there; a GPU's lie in its host's memory
    convert            a tile of the last node, (x, Y, Z, C) -> what is stored of it, in output_dtype
    step               called after every tile with the operations done
    Returns            (N, C', X', Y', Z'), channels-last
    Raises             ValueError where no plan fits, OSError where the spool's disk has no room.
    """
    plan = plan_for(nodes, x.shape, x.dtype, x.device, memory_budget, spool_dir,
                    output_dtype.itemsize if output_dtype else None)  # fmt: skip
    *size, channels = *plan.graph.sizes[-1], nodes[-1].channels
    result = torch.empty(len(x), *size, channels, dtype=output_dtype or x.dtype, device=x.device)
    for sample, out in zip(x.split(1), result, strict=True):
        Run(plan, parameters, planes_of(sample), out, spool_dir, convert, step)()
    return channels_last(result.permute(0, 4, 1, 2, 3))
