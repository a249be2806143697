"""A network of which every rank holds a share: weights, gradients and what follows from them, by torch's fully_shard.

Outside a forward pass each parameter is a DTensor, a few rows of it here; inside, a block's are whole, then forgotten.
What goes number by number (Adam, the average) is done on the rows that a rank has. The functions here are for whoever
needs more: norms, whole tensors for checkpoints, a whole network to look at. Of networks that are not shared they leave
everything as it is.

torch.distributed's own modules are imported when they are needed: that takes as long as all the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from t2ct.train.parts.blocks import blocks_of

# Large layers of CLIP3D outside its blocks: by themselves, so that they are not whole for as long as an update takes.
LARGE = ("visual_projection", "token_embedding")


def units_of(network: nn.Module) -> list[nn.Module]:
    """The modules whose parameters are put together and forgotten at once; the rest is one more."""
    return blocks_of(network) + [m for name, m in network.named_modules() if name.endswith(LARGE)]


def fully_shard(call: nn.Module, network: nn.Module, device: torch.device) -> None:
    """Leave every rank its share of `network`, which `call` computes with; in place. All ranks must call `call` alike.

    Numbers are computed under autocast as ever, so that they are those of one process. What has no rows (CLIP3D's
    logit_scale) or no numbers stays whole: see `mean_whole`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard as share_out

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    whole = {p for p in network.parameters() if not p.ndim or not p.numel()}
    for module in (*units_of(network), call):
        # The root too: outside `call` nobody shall find whole parameters.
        share_out(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def is_shared(tensor: Tensor) -> bool:
    """Does this rank hold a share of it alone? (Is it a DTensor?)"""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this rank has of it, the same memory."""
    found: Any = tensor.detach()
    return found.to_local() if is_shared(tensor) else found


def as_shared(values: Mapping[str, Tensor], like: Mapping[str, Any]) -> dict[str, Tensor]:
    """Whole tensors, of which every rank has the same, shared out as those of `like` under the same keys are."""
    made = dict(values)
    for key in values.keys() & like.keys():
        if is_shared(like[key]):
            from torch.distributed.tensor import distribute_tensor

            there = like[key].device_mesh, like[key].placements
            made[key] = distribute_tensor(values[key].to(like[key].device), *there, src_data_rank=None)
    return made


def share_of(value: Tensor, like: Any) -> Tensor:
    """Of a whole tensor, of which every rank has the same, what this rank has where it is shared out as `like`."""
    return local(as_shared({"": value}, {"": like})[""])


def whole(share: Tensor, like: Any) -> Tensor:
    """The whole tensor of which every rank has such a share as of `like`; all ranks must call."""
    if not is_shared(like):
        return share
    from torch.distributed.tensor import DTensor

    there = (like.device_mesh, like.placements)
    share = share.to(like.device)
    return DTensor.from_local(share, *there, run_check=False, shape=like.shape, stride=like.stride()).full_tensor()


def gathered(shares: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors one after another, in the first rank's host memory; the others get none of what is shared."""
    kept: dict[str, Tensor] = {}
    for key, share in shares.items():
        value = whole(local(share), like[key])
        if not is_shared(like[key]):
            kept[key] = value
        elif dist.get_rank() == 0:
            kept[key] = value.cpu()
    return kept


def alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Shared tensors and whole ones apart: torch's operators on lists take no mixture."""
    lists: tuple[list[Tensor], list[Tensor]] = ([], [])
    for tensor in tensors:
        lists[is_shared(tensor)].append(tensor)
    return [found for found in lists if found] or [[]]


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients, over all ranks' shares."""
    norms: list[Any] = [get_total_norm(found, foreach=True) for found in alike(gradients)]
    norms = [n.full_tensor() if is_shared(n) else n for n in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip(parameters: Iterable[nn.Parameter], longest: float, norm: Tensor) -> None:
    """Scale gradients whose `total_norm` is `norm` to `longest`."""
    for found in alike(parameters):
        clip_grads_with_norm_(found, longest, norm, foreach=True)


def mean_whole(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over the ranks of gradients of what stays whole in a shared network: fully_shard passes over it."""
    for p in parameters:
        if p.grad is not None and not is_shared(p):
            p.grad /= dist.get_world_size()
            dist.all_reduce(p.grad)


def hollow(network: nn.Module) -> nn.Module:
    """A copy of a network that is not shared yet, without numbers, which `filled` makes one to look at."""
    memo: dict[int, Any] = {}
    for tensor in network.state_dict(keep_vars=True).values():
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    made = copy.deepcopy(network, memo)
    for module in made.modules():
        module.__dict__.pop("forward", None)  # of blocks that are computed again: it knows the original
    return made


def filled(skeleton: nn.Module, shares: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> nn.Module:
    """A whole network of `hollow`'s kind on every rank, for as long as it is needed; all ranks must call."""
    network = copy.deepcopy(skeleton)
    device = next(iter(like.values())).device
    network.load_state_dict({k: whole(local(v), like[k]).to(device) for k, v in shares.items()}, assign=True)
    return network
