"""Run a network over a volume inside a memory budget: plan, then carry out, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from t2ct.ops.dispatch import EMULATED, channels_last, forced, large_pages, why_not
from t2ct.stream.budget import free_memory, parse_bytes
from t2ct.stream.gradient import differentiable, plan_backward
from t2ct.stream.graph import Graph, Node
from t2ct.stream.plan import Plan, make_plan
from t2ct.stream.run import Run, planes_of
from t2ct.stream.spool import check_folder, check_room

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
    """The plan for x of `shape` (N, C, X, Y, Z): see `execute`. ValueError where no plan fits the budget, OSError where
    its spool does not fit the disk."""
    device = torch.device(device)
    compiled = forced() in (None, "cpu") and why_not("cpu", "cpu", dtype) is None
    if device.type == "cuda":
        compiled = forced() == "triton"  # until a GPU has shown those kernels right, others do not run unasked
    generic = not compiled
    emulated = device.type == "cpu" and dtype in EMULATED
    size, threads = tuple(shape[2:]), torch.get_num_threads() if device.type == "cpu" else 1
    graph = Graph(tuple(nodes), size, dtype.itemsize, device.type, generic, emulated, threads)  # type: ignore[arg-type]
    itemsize = output_itemsize or dtype.itemsize
    budget = _bytes(memory_budget, device)
    # The results of the other samples of the batch are there as well.
    others = (shape[0] - 1) * graph.costs[-1].bytes // graph.itemsize * itemsize
    plan = make_plan(graph, budget, _may_spool(device, spool_dir), itemsize, others)
    here = device.type == "cuda" and torch.cuda.is_available()  # not a plan for another machine
    if here and plan.spool > free_memory("cpu"):  # pinned memory is the host's
        plan = make_plan(graph, budget, False, itemsize, others)
    if device.type == "cpu" and spool_dir is not None:
        check_room(spool_dir, plan.spool)
    return plan


def _bytes(memory_budget: Budget, device: torch.device) -> int:
    return free_memory(device) if memory_budget is None else parse_bytes(memory_budget)


def _may_spool(device: torch.device, spool_dir: str | Path | None) -> bool:
    return device.type == "cuda" or check_folder(spool_dir) is not None


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
    Returns            (N, C', X', Y', Z'), channels-last; differentiable in x and parameters where gradients are on and
                       wanted: then the budget holds for the backward pass as well, and nothing is kept between the two
    Raises             ValueError where no plan fits, or where a gradient of what is converted is wanted; OSError where
                       the spool's disk has no room.
    """
    plan = plan_for(nodes, x.shape, x.dtype, x.device, memory_budget, spool_dir,
                    output_dtype.itemsize if output_dtype else None)  # fmt: skip

    def forward(parameters: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, list]:
        *size, channels = *plan.graph.sizes[-1], nodes[-1].channels
        result = large_pages(torch.empty(len(x), *size, channels, dtype=output_dtype or x.dtype, device=x.device))
        stats = []
        for sample, out in zip(x.split(1), result, strict=True):
            run = Run(plan, parameters, planes_of(sample), out, spool_dir, convert, step)
            run()
            stats.append(run.stats)
        return channels_last(result.permute(0, 4, 1, 2, 3)), stats

    learns = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters.values()))
    if not learns:
        with torch.no_grad():
            return forward(parameters, x)[0]
    if convert is not None:
        raise ValueError("convert: a gradient is wanted, and integers have none")
    names = [part for node in nodes for part in (node.name, node.norm, node.shortcut) if part]
    used = {f"{name}.{kind}": parameters[f"{name}.{kind}"] for name in names for kind in ("weight", "bias")}
    # Beside a sample's backward pass: the result and its gradient, the input's, the parameters' as they are added up
    # and as they are returned.
    wide = max(4, x.itemsize)
    beside = 2 * len(x) * plan.graph.costs[-1].bytes + x.nbytes + sum(p.numel() for p in used.values()) * 2 * wide
    room = _bytes(memory_budget, x.device) - beside
    backward = plan_backward(plan.graph, room, _may_spool(x.device, spool_dir), beside)
    return differentiable(forward, backward, spool_dir, used, x)
