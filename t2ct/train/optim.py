"""Adam, Muon for matrices, the learning rate's course, and the average of the weights. Where a device has no room, the
optimisers and the average lie in the host's memory: the same numbers, and copies over the bus every update."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2ct.train.config import Training
from t2ct.train.parts.shard import gathered, is_shared, local, share_of, whole

MESSAGE = 1 << 22  # numbers that travel between ranks at once: enough to be quick, little beside a network


def rate_factor(step: int, config: Training) -> float:
    """What the learning rates are multiplied with at `step`: linear warm-up to 1, then the schedule."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * config.steps
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1.0, config.steps - warmup))
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return (1 - progress) ** config.power if config.schedule == "polynomial" else 1.0


class Optimisers:
    """AdamW, and for the matrices Muon (Jordan et al. 2024) where it has a rate, with one state to save and restore.

    With one volume a step a gradient is nearly of rank one (brightness, contrast) and Adam swings along it; Muon's
    orthogonalised update learns every direction at once.

    host: the optimisers step on copies in the host's memory, so that a device holds weights and gradients alone.
    bits: of Adam's moments; 8 needs torchao.
    shard: (rank, world): steps this rank's share of the parameters, and hands them round (Rajbhandari et al. 2020,
    ZeRO stage 1). Of a network that is shared itself (`parts.shard`) Adam steps the rows that are here; Muon needs
    whole matrices, so each is put together on the rank that steps it.
    """

    def __init__(
        self, model: nn.Module, rate: float, matrix_rate: float, weight_decay: float, host: bool = False,
        bits: int = 32, shard: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        self.live = {k: p for k, p in model.named_parameters() if p.requires_grad}
        self.split, self.on_host = any(map(is_shared, self.live.values())), host
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        muons = {k for k, p in self.live.items() if matrix_rate and p.ndim > 1 and id(p) not in embeddings}
        handed = {k: p.numel() for k, p in self.live.items() if not self.split or k in muons}
        self.shares = shared_out(handed, shard[1])
        own = {k: p for k, p in self.live.items() if k in self.shares[shard[0]] or k not in handed}
        # What is stepped in a live parameter's stead: its copy on the host, or its rows.
        rows = {k: local(p) for k, p in own.items() if not (self.split and k in muons)}
        copies = {k: p.to("cpu", copy=True) if host else p for k, p in rows.items()} if host or self.split else {}
        self.apart = {k: nn.Parameter(p) for k, p in copies.items()}
        stepped = self.apart or own
        rest = {k: p for k, p in stepped.items() if k not in muons}
        # Muon takes matrices: a convolution's weight (out, in, 3, 3, 3) is shown to it as (out, in * 27), a view.
        self.matrices = {k: nn.Parameter(p.detach().view(len(p), -1)) for k, p in stepped.items() if k in muons}
        if self.split:  # put together for each step: see `_gather`
            self.matrices = {k: nn.Parameter(_nothing(p, host)) for k, p in own.items() if k in muons}
        self.rates = {"adam": rate, "muon": matrix_rate}
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        if rest:
            self.optimisers["adam"] = _adam(list(rest.values()), rate, weight_decay, bits)
        if self.matrices:
            muon = torch.optim.Muon(self.matrices.values(), lr=matrix_rate, weight_decay=weight_decay)
            self.optimisers["muon"] = muon
        self.owners = {k: ("adam", p) for k, p in rest.items()} | {k: ("muon", p) for k, p in self.matrices.items()}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.live.values():
            parameter.grad = None

    def step(self, factor: float) -> None:
        """One update at `factor` times the learning rates. On the host it takes the gradients along."""
        for key, copy in self.apart.items():
            gradient, now = self.live[key].grad, local(self.live[key])
            if self.on_host:
                copy.data.copy_(now)  # a recipe may have moved it, as CLIP3D's clamps its scale
            else:
                copy.data = now
            copy.grad = None if gradient is None else local(gradient).to(copy.device, copy=self.on_host)
            self.live[key].grad = None
        if self.split:
            self._gather()
        else:
            for key, matrix in self.matrices.items():
                gradient = (self.apart or self.live)[key].grad
                matrix.grad = None if gradient is None else gradient.reshape(matrix.shape)
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                if isinstance(group["lr"], Tensor):  # torchao's, which compiles it in
                    group["lr"].fill_(factor * self.rates[name])
                else:
                    group["lr"] = factor * self.rates[name]
            optimiser.step()
        for matrix in self.matrices.values():
            matrix.grad = None  # a copy, where the gradient lay channels-last
        with torch.no_grad():
            for key, copy in self.apart.items():
                if self.on_host:
                    local(self.live[key]).copy_(copy)
                copy.grad = None
            if len(self.shares) > 1:
                self._hand_round()

    @torch.no_grad()
    def _gather(self) -> None:
        """Of a shared network the matrices and their gradients, whole, each to the rank that steps it."""
        for rank, keys in enumerate(self.shares):
            for key in keys:
                live = self.live[key]
                parts = [whole(local(t), live) for t in (live, live.grad) if t is not None]
                live.grad = None
                if rank == dist.get_rank():
                    matrix = self.matrices[key]
                    matrix.data, *gradient = (t.view(len(live), -1).to(matrix.device) for t in parts)
                    matrix.grad = gradient[0] if gradient else None

    def _hand_round(self) -> None:
        """What each rank has stepped to all others."""
        for rank, keys in enumerate(self.shares):
            for some in messages({k: self.live[k].numel() for k in keys}):
                self._send(rank, some)
        for matrix in self.matrices.values() if self.split else ():
            matrix.data = _nothing(matrix, self.on_host)

    def _send(self, rank: int, keys: list[str]) -> None:
        parameters = [self.live[k] for k in keys]
        sizes = [p.numel() for p in parameters]
        message = local(parameters[0]).new_empty(sum(sizes))
        if rank == dist.get_rank():
            source = self.matrices if self.split else self.live
            torch.cat([source[k].reshape(-1).to(message.device) for k in keys], out=message)
        dist.broadcast(message, rank)
        for parameter, values in zip(parameters, message.split(sizes), strict=True):
            local(parameter).copy_(share_of(values.view(parameter.shape), parameter))

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the optimisers' memory, as "muon.key.momentum_buffer"; one of 8 bits as its parts,
        "adam.key.exp_avg:codes". Of several ranks all must call; the first gets the shares of all."""
        kept: dict[str, Tensor] = {}
        shared: dict[str, Tensor] = {}
        like: dict[str, Tensor] = {}
        for key, (name, parameter) in self.owners.items():
            for what, value in self.optimisers[name].state.get(parameter, {}).items():
                if is_shared(self.live[key]) and name == "adam" and value.ndim:
                    shared[f"{name}.{key}.{what}"], like[f"{name}.{key}.{what}"] = value, self.live[key]
                    continue
                if hasattr(value, "__tensor_flatten__"):
                    parts = value.__tensor_flatten__()[0]
                    kept |= {f"{name}.{key}.{what}:{part}": getattr(value, part) for part in parts}
                elif isinstance(value, Tensor):
                    kept[f"{name}.{key}.{what}"] = value
        kept |= gathered(shared, like)
        if len(self.shares) == 1:
            return kept
        every: list[Any] | None = [None] * len(self.shares) if dist.get_rank() == 0 else None
        dist.gather_object({k: v.cpu() for k, v in kept.items()}, every)
        return {k: v for part in every or [kept] for k, v in part.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        by_owner: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            owner, _, what = name.rpartition(".")
            by_owner.setdefault(owner, {})[what] = value
        for key, (name, parameter) in self.owners.items():
            kept = by_owner.get(f"{name}.{key}")
            if kept:
                by_rows = name == "adam" and is_shared(self.live[key])
                rows = {k: share_of(v, self.live[key]) if by_rows and v.ndim else v for k, v in kept.items()}
                moments = {k: v.clone().to("cpu" if k == "step" else parameter.device) for k, v in rows.items()}
                moments = _joined(moments, parameter.dtype)
                fused = isinstance(self.optimisers[name], torch.optim.AdamW)
                if fused and parameter.is_cuda and "step" in moments:  # it counts on its device
                    moments["step"] = moments["step"].to(parameter.device)
                self.optimisers[name].state[parameter] = moments


def _nothing(like: Tensor, host: bool) -> Tensor:
    """A matrix without numbers in the place of one that is put together later."""
    return torch.empty(0, 0, device="cpu" if host else like.device)


def messages(sizes: dict[str, int]) -> list[list[str]]:
    """The names of tensors that travel together: few messages, none with more than MESSAGE numbers of several."""
    found: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room:
            found.append([])
            room = MESSAGE
        found[-1].append(name)
        room -= size
    return found


def shared_out(sizes: dict[str, int], ranks: int) -> list[list[str]]:
    """The names that each of so many ranks gets: the largest first, to who has least; as all ranks work it out."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for name in sorted(sizes, key=lambda k: (-sizes[k], k)) if ranks > 1 else sizes:
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name]
    return shares


def check_optimiser(config: Training) -> None:
    """ValueError where the configuration wants a package that is not there."""
    if config.optimiser_bits == 8 and find_spec("torchao") is None:
        raise ValueError("optimiser_bits: wanted torchao for 8 (pip install 't2ct[train]'), got none")


def moment_bytes(numel: int, muon: bool, bits: int) -> float:
    """What an optimiser keeps of a parameter: Muon a momentum, Adam two moments, of 8 bits where blocks of 256 fit."""
    if muon:
        return 4.0 * numel
    return 2 * numel * (1 + 4 / 256) if bits == 8 and numel >= 4096 and numel % 256 == 0 else 8.0 * numel


def _adam(parameters: list[nn.Parameter], rate: float, decay: float, bits: int) -> torch.optim.Optimizer:
    if bits == 32:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=rate, weight_decay=decay)


def _joined(moments: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Moments of 8 bits from their parts; others as they are."""
    whole = {name: value for name, value in moments.items() if ":" not in name}
    for what in {name.partition(":")[0] for name in moments.keys() - whole.keys()}:
        from torchao.optim.subclass_8bit import OptimState8bit

        parts = [moments[f"{what}:{part}"] for part in OptimState8bit.tensor_attrs]
        whole[what] = OptimState8bit(*parts, signed=what == "exp_avg", dtype=dtype)
    return whole


class Average:
    """A float32 average of a network's parameters, of a shared one this rank's rows; buffers are copied. decay 0: none
    is kept; host: it lies in the host's memory."""

    def __init__(self, model: nn.Module, decay: float, host: bool = False):
        self.decay, self.updates, self.host = decay, 0, host
        kept = model.state_dict().items() if decay else ()
        self.weights = {k: local(v).to("cpu" if host else v.device, copy=True) for k, v in kept}
        self.parameters = {k for k, _ in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow the model; quickly at first, while the average is young."""
        if not self.decay:
            return
        self.updates += 1
        share = 1 - min(self.decay, self.updates / (self.updates + 9))
        state = {k: local(v) for k, v in model.state_dict().items()}
        moving = [k for k in state if k in self.parameters and state[k].is_floating_point()]
        if self.host:  # one after another: the host need not hold all of them twice
            for key in moving:
                self.weights[key].lerp_(state[key].to("cpu"), share)
        else:
            torch._foreach_lerp_([self.weights[k] for k in moving], [state[k] for k in moving], share)
        for key in state.keys() - set(moving):
            self.weights[key].copy_(state[key])
