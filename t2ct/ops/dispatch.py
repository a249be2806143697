"""Which kernel runs. An op's table lists its backends in order of preference; the first that can run wins."""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("cuda", "triton", "sdpa", "xformers", "cpu", "reference")
Table = Mapping[str, Callable[..., Any]]

_C: Any = None
_no_native = ""
try:
    _C = import_module("t2ct._C")
except ModuleNotFoundError:
    _no_native = "t2ct._C was not built (`pip install -v` of t2ct prints why; it takes a C++ compiler)"
except ImportError as error:
    _no_native = f"t2ct._C did not load ({error})"


# Kernels run unasked only where a results file in benchmarks/results/ shows them right and faster; the others when
# `use_backend` asks for them.
UNPROVEN = {
    "cuda": "it has not been measured on a GPU yet: use_backend('cuda') runs it",
    "triton": "it has not been measured on a GPU yet: use_backend('triton') runs it",
    "xformers": "it has not been measured on a GPU yet: use_backend('xformers') runs it",
}


# What torch asks before it gives oneDNN a convolution of these dtypes.
ONEDNN_HAS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def _emulated() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available():
        return frozenset(ONEDNN_HAS)
    # A torch that has renamed a question keeps its own convolutions: in float32 those of a fast processor would suffer.
    questions = {dtype: getattr(torch.ops.mkldnn, name, lambda: True) for dtype, name in ONEDNN_HAS.items()}
    return frozenset(dtype for dtype, native in questions.items() if not native())


# Dtypes that this processor has no products of. Torch's convolutions then write every voxel 27 times and multiply one
# number at a time, many times slower than in float32.
EMULATED = _emulated()


def kernel(family: str, name: str) -> Callable[..., Any]:
    """The launcher `name` of kernels/`family`.py, a row of a table; Triton is imported when it is first called, and
    launches on the GPU where the tensors lie, which need not be torch's current one."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        run = getattr(import_module(f"t2ct.kernels.{family}"), name)
        device = next((t.device for t in args if isinstance(t, Tensor) and t.is_cuda), None)
        if device is None or device.index == torch.cuda.current_device():
            return run(*args, **kwargs)
        with torch.cuda.device(device):
            return run(*args, **kwargs)

    launch.__name__ = name
    return launch


def native() -> Any:
    """The compiled module t2ct._C, or None where it is missing; `why_not` says why."""
    return _SILENT if _shapes and _C is not None else _C


class _Silent:
    """t2ct._C whose kernels write nothing. What takes no argument or answers in bytes is a question, and answered."""

    note: Callable[..., None] | None = None

    def __getattr__(self, name: str) -> Any:
        found = getattr(_C, name)
        if not callable(found) or name.endswith("_bytes"):
            return found

        def silent(*given: Any) -> Any:
            if not given:
                return found()
            return None if self.note is None else self.note(name, *given)

        return silent


_SILENT, _shapes = _Silent(), False


@contextmanager
def shapes_alone(note: Callable[..., None] | None = None) -> Iterator[None]:
    """Inside, torch's fake tensors go the way that real ones go (see `watched`), and the compiled kernels write
    nothing: for counting what a step takes without its arithmetic. Real tensors would be left without numbers.
    note: told the name and the arguments of every kernel of t2ct._C that would have run."""
    global _shapes
    before, _shapes, _SILENT.note = (_shapes, _SILENT.note), True, note
    try:
        yield
    finally:
        _shapes, _SILENT.note = before


def is_channels_last(x: Tensor) -> bool:
    """True where x (N, C, *spatial) is dense with the channels of one voxel next to each other."""
    if x.dim() == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d)
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def channels_last(x: Tensor) -> Tensor:
    """x (N, C, X, Y, Z) with channels innermost in memory; no work where it is so already."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def watched(x: Tensor) -> bool:
    """True where something must see an operator (compilation, tracing, meta tensors, dispatch modes, torch.func).
    Elsewhere the kernel is called directly: a network makes a hundred calls a pass, and the custom op's machinery
    costs ~40 us each, ~200 us with its gradient."""
    if _shapes:
        return False
    return (torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in (Tensor, torch.nn.Parameter)
            or x.device.type not in ("cpu", "cuda") or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0)


def why_not(backend: str, device: str, dtype: torch.dtype, channels_last: bool = True) -> str | None:
    """The reason `backend` cannot run on tensors of `device` ("cuda": torch's current GPU), or None. Tests skip with
    this string, users read it."""
    if torch.compiler.is_compiling():  # torch.compile looks through a cache, and warns that it does
        return _why_not(backend, device, dtype, channels_last)
    return _why_not_cached(backend, device, dtype, channels_last)


def _why_not(backend: str, device: str, dtype: torch.dtype, channels_last: bool = True) -> str | None:
    if backend == "cpu":
        if device != "cpu":
            return f"the tensors are on {device}"
        if _C is None:
            return _no_native
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if not channels_last:
            return "it reads channels_last memory; other layouts run on the reference"
    if backend == "triton":
        return _why_not_triton(device, dtype, channels_last)
    if backend == "cuda":
        return _why_not_cuda(device)
    return None


_NO_GPU = "torch sees no GPU: torch.cuda.is_available() is False"


def _why_not_cuda(device: str) -> str | None:
    if device.partition(":")[0] != "cuda":
        return f"the tensors are on {device}"
    if _C is None:
        return _no_native
    if not _C.cuda_targets:
        return f"t2ct._C was built without CUDA kernels ({_C.cuda_absent})"
    missing = _C.cuda_driver_missing()
    if missing or not torch.cuda.is_available():
        return missing or _NO_GPU
    capability = torch.cuda.get_device_capability(device)
    if not any(serves(target, capability) for target in _C.cuda_targets):
        return f"its kernels are built for {', '.join(_C.cuda_targets)}, not for compute capability {capability}"
    return None


def serves(target: str, capability: tuple[int, int]) -> bool:
    """Does code for `target` run on such a GPU? compute_80 (PTX) on 8.0 and all later ones; sm_80 on 8.0 to 8.9;
    sm_90a on 9.0 alone."""
    kind, _, number = target.rstrip("a").partition("_")
    built = (int(number) // 10, int(number) % 10)
    if target.endswith("a"):
        return capability == built
    return capability >= built and (kind == "compute" or capability[0] == built[0])


_why_not_cached = cache(_why_not)


def _why_not_triton(device: str, dtype: torch.dtype, channels_last: bool) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed: pip install t2ct[gpu]"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    on_gpu = device.partition(":")[0] == "cuda"
    if not on_gpu and not (interpreted and device == "cpu"):
        return f"the tensors are on {device}"
    if on_gpu and not interpreted:
        if not torch.cuda.is_available():
            return _NO_GPU
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it takes a GPU of compute capability 8.0 or more"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if not channels_last:
        return "it reads channels_last memory; other layouts run on the reference"
    return None


def refusal(backend: str, x: Tensor) -> str | None:
    """Why `backend` does not run on x by itself, or None. One that is forced need not be proven."""
    reason = why_not(backend, str(x.device), x.dtype, is_channels_last(x))
    return reason or (None if _forced == backend else UNPROVEN.get(backend))


def candidates(table: Table) -> tuple[str, ...]:
    """The backends of a table that may run, in order of preference: the forced one alone where the op has it."""
    return (_forced,) if _forced and _forced in table else tuple(table)


def choose(op: str, table: Table, x: Tensor) -> tuple[str, Callable[..., Any]]:
    """(backend, kernel) for `op` on x. A forced backend that the op has must run or raise: no silent fallback."""
    reason: str | None = None
    backend = "reference"
    for backend in candidates(table):
        reason = refusal(backend, x)
        if reason is None:
            return backend, table[backend]
    raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")


def _known(name: str | None) -> str | None:
    if name not in (None, *BACKENDS):
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    return name


_forced = _known(os.environ.get("T2CT_BACKEND") or None)


def forced() -> str | None:
    """The backend that `use_backend` or T2CT_BACKEND asks for."""
    return _forced


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend inside the block, for every op that has it; None restores the automatic choice.

    A gradient is computed by what is forced when `backward` runs, so it belongs inside the block too.
    """
    global _forced
    before, _forced = _forced, _known(name)
    try:
        yield
    finally:
        _forced = before


LARGE = 2**22  # bytes of a tensor that holds a whole page of 2 MB wherever it begins


@cache
def _advise() -> Callable[..., Any] | None:
    """The system's madvise, where it knows large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return found


def large_pages(x: Tensor) -> Tensor:
    """x, to which nothing was written yet, on pages of 2 MB where the system has them for who asks.

    A new tensor's pages are made when they are first written. Of 4 kB each that takes several times what an op takes to
    write them, and torch asks for no others unless THP_MEM_ALLOC_ENABLE=1 was set before it was imported.
    """
    real = type(x) is Tensor and x.device.type == "cpu" and not _shapes  # a fake one lies nowhere
    if real and x.nbytes >= LARGE and (advise := _advise()) is not None:
        page, start = mmap.PAGESIZE, x.data_ptr()
        first = -(-start // page) * page
        advise(first, (start + x.nbytes - first) // page * page, mmap.MADV_HUGEPAGE)  # no more than a wish
    return x
