"""What an update takes, by going through it with tensors that have shapes and no numbers.

The whole update runs, the optimiser's step and the average's too, at its true size, within seconds, whatever its size:
torch's fake tensors carry shapes through every operator, and what each of them allocates and frees is added up. The
compiled kernels are called for their results' shapes alone.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from t2ct.models import CLIP3D, VAE
from t2ct.ops.conv_cpu import DIRECT, TORCH_SMALL, WINOGRAD
from t2ct.ops.dispatch import shapes_alone
from t2ct.train.config import CLIPTraining, LDMTraining, Training
from t2ct.train.loop import Run
from t2ct.train.memory.recipes import checkpoint_blocks, probe_recipe
from t2ct.train.optim import moment_bytes
from t2ct.train.recipe import Batch, by_itself

CONVOLUTIONS = {"conv3d": DIRECT, "conv3d_winograd": WINOGRAD}  # kernels of t2ct._C
MARGIN = 1.08  # what kernels take inside themselves besides: reordered weights, copies that no operator shows
BLOCK = 16 * 16
MICROS = 2  # micro-batches that are gone through: further ones take their input, and no more
aten = torch.ops.aten
# No arithmetic: another look at the same numbers, or room for numbers to come.
FREE = {
    aten.detach.default, aten.alias.default, aten._unsafe_view.default, aten.empty.memory_format,
    aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Bytes of an update at most (`peak`), and between two (`fixed`); its work: floating-point operations by kind
    ("conv", "matmul"), bytes that its operators read and write (`moved`), and how many they are (`calls`)."""

    peak: float
    fixed: float
    work: Mapping[str, float]


def count_update(
    kind: str, config: Training, micro: int, blocks: bool, device: torch.device, standing: bool = False
) -> Cost:
    """The cost of an update of config.batch samples, `micro` at once, on one CPU; blocks: computed again; standing: the
    gradients are there all the time, so that they may be taken off the peak."""
    return _count(kind, config, micro, blocks, device, standing, torch.get_num_threads())


@lru_cache(maxsize=64)
def _count(
    kind: str, config: Training, micro: int, blocks: bool, device: torch.device, standing: bool, threads: int
) -> Cost:
    """threads: each works in memory of its own, so what was counted for some is not remembered for others."""
    parts = config.batch // micro
    gone = min(parts, MICROS)
    counting = _Count(_whole_number(config))
    with shapes_alone(counting.kernel), by_itself(), _quiet(), FakeTensorMode(), counting as count:
        recipe = probe_recipe(kind, config, device)
        if blocks:
            checkpoint_blocks(recipe.parts)
        for part in recipe.parts.values():
            part.train()
        used = [network.state_dict() for network in _used(config)]
        run = Run(recipe, replace(config, batch=micro * gone, optimiser_bits=32), device)  # torchao's compiles itself
        before = count.now
        micros = [recipe.example(device, micro) for _ in range(gone)]
        further = (parts - gone) * (count.now - before) / gone
        run.step = config.steps - 1  # when everything counts
        if standing or len(run.optimisers) > 1:  # with the gradients and moments that an update before left
            run.update(micros)
            for optimisers in run.optimisers.values() if standing else ():
                optimisers.zero_grad = lambda: None  # type: ignore[method-assign]
            count.restart()
            run.update(micros)
            peak = count.peak
        else:
            peak = _first_as_later(run, micros, count)
        del used
        saved = _saved(run, config.optimiser_bits)
        fixed, peak, work = count.now + further - saved, peak - saved, count.work
    work = {name: amount * parts / gone for name, amount in work.items()}  # the optimiser's is little beside
    return Cost(MARGIN * (peak + further - fixed) + fixed, fixed, work)


def _first_as_later(run: Run, micros: list[Batch], count: _Count) -> int:
    """The peak of a later update of one network, from its first, in half the time: the moments, which the first step
    makes, are there from the start."""
    (optimisers,) = run.optimisers.values()
    step, until = optimisers.step, [0]

    def noted(factor: float) -> None:
        until[0] = count.peak
        step(factor)

    optimisers.step = noted  # type: ignore[method-assign]
    count.restart()
    run.update(micros)
    states = (state for o in optimisers.optimisers.values() for state in o.state.values())
    moments = sum(v.nbytes for state in states for v in state.values() if isinstance(v, Tensor))
    return max(until[0] + moments, count.peak)


def _saved(run: Run, bits: int) -> float:
    """Bytes of moments that a run with `bits` has less than this one with 32."""
    owners = (owner for optimisers in run.optimisers.values() for owner in optimisers.owners.values())
    sizes = [(p.numel(), name == "muon") for name, p in owners]
    return sum(moment_bytes(n, muon, 32) - moment_bytes(n, muon, bits) for n, muon in sizes)


def _used(config: Training) -> list[torch.nn.Module]:
    """Networks that a run holds and does not train."""
    if not isinstance(config, LDMTraining):
        return []
    return [VAE(config.model.vae), CLIP3D(config.model.clip, towers=("text",))]


def _whole_number(config: Training) -> int:
    """What to say where Python asks a tensor for a whole number: only the text tower does, for its longest text."""
    return config.model.clip.text.max_length if isinstance(config, CLIPTraining) else 0


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # the compiled kernels are handed it, and write nothing
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


class _Count(TorchDispatchMode):
    """Adds up what operators allocate and what is freed, and their work."""

    def __init__(self, whole_number: int):
        super().__init__()
        self.whole_number = whole_number
        self.now = self.peak = 0
        self.work: Counter = Counter()
        self._alive: dict[int, int] = {}

    def restart(self) -> None:
        """Forget the peak and the work, not what is alive."""
        self.peak, self.work = self.now, Counter()

    def kernel(self, name: str, *given: Any) -> None:
        """The work of a convolution by t2ct._C, which is no operator."""
        if name in CONVOLUTIONS:
            n, x, y, z, channels, outputs, bfloat16 = given[0]
            numbers = n * x * y * z * outputs
            self.work["conv"] += 2 * CONVOLUTIONS[name] * numbers * channels
            self.work["moved"] += (2 if bfloat16 else 4) * numbers * (1 + channels / outputs)
            self.work["calls"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            whole = not (args[0].is_floating_point() or args[0].dtype is torch.bool)
            return self.whole_number if whole else 0.0 if args[0].is_floating_point() else False
        by_onednn = func is aten.mkldnn_convolution.default
        if by_onednn:  # it has no shapes without numbers; the same as
            x, weight, bias, padding, stride, dilation, groups = args
            func, args = aten.convolution.default, (x, weight, bias, stride, padding, dilation, False, [0] * 3, groups)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        if not by_onednn:
            self.peak = max(self.peak, self.now + _inside(func, args, out))
        self._note_work(func, args, kwargs or {}, out)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key)

    def _note_work(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func.is_view or func in FREE:
            return
        self.work["calls"] += 1
        for tensor in tree_iter((args, kwargs, out)):
            if isinstance(tensor, Tensor):
                self.work["moved"] += tensor.nbytes
        packet = func.overloadpacket
        if packet in flop_registry:
            kind = "conv" if "convolution" in str(packet) else "matmul"
            self.work[kind] += flop_registry[packet](*args, **kwargs, out_val=out)


def _inside(func: Any, args: Any, out: Any) -> int:
    """Bytes that a convolution on a CPU takes inside itself, where they are many (ATen/native/Convolution.cpp)."""
    backward = func is aten.convolution_backward.default
    if not backward and func is not aten.convolution.default:
        return 0
    x, weight = (args[1], args[2]) if backward else (args[0], args[1])
    groups = args[9] if backward else args[8]
    if groups > 1:  # oneDNN blocks the channels of each group in sixteens, and wants the gradient so too
        return BLOCK * weight.numel() * (4 if x.dtype is torch.float32 else 10) if backward else 0
    few = len(x) == 1 and x.shape[:4].numel() <= TORCH_SMALL and min(weight.shape[2:]) <= 3
    if x.dtype is not torch.float32 or not few:
        return 0
    voxels = (args[0] if backward else out).shape[2:].numel()
    return x.shape[1] * weight.shape[2:].numel() * voxels * 4  # every voxel is written once for each tap


def seconds_of(work: Mapping[str, float], pace: Mapping[str, float]) -> float:
    """How long that work takes at that pace: its kinds one after another."""
    return sum(amount * pace[name] for name, amount in work.items())


def pace_of(precision: torch.dtype) -> dict[str, float]:
    """Seconds for an operation of a convolution and of a matrix product in `precision`, for a byte read or written and
    for the call of an operator, on this CPU with torch's present threads: each tried for a moment."""
    x = torch.randn(1, 64, 24, 24, 24).to(precision, memory_format=torch.channels_last_3d).requires_grad_()
    weight = torch.randn(64, 64, 3, 3, 3).to(precision, memory_format=torch.channels_last_3d).requires_grad_()
    a, b = torch.randn(1024, 1024).to(precision), torch.randn(1024, 1024).to(precision)
    large, small = torch.randn(1 << 24), torch.randn(16)

    def convolve() -> None:
        F.conv3d(x, weight, padding=1).sum().backward()

    def call() -> None:
        for _ in range(1000):
            small.add(1)

    return {
        "conv": _time(convolve) / (3 * 2 * weight.numel() * x[0, 0].numel()),
        "matmul": _time(lambda: a @ b) / (2 * 1024**3),
        "moved": _time(lambda: large.add(1)) / (2 * large.nbytes),
        "calls": _time(call) / 1000,
    }


def _time(run: Callable[[], Any]) -> float:
    run()
    started, times = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < 0.3 or not times:
        run()
        times += 1
    return passed / times
