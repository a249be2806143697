"""What every test file shares: the reason to skip tests that need a GPU, the compiled kernels one by one.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors; the switch is read when they are imported.
"""

import os
from dataclasses import replace

import pytest

# Two processes of two threads each on two cores took five times as long as one: threads that spin let nobody work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch  # noqa: E402  after the switch, which its OpenMP reads once


def quicken_interpreter():
    """Half of the interpreter's time goes into the operands of overflow checks that it then skips (`debug` is off)."""
    try:
        from triton.runtime.interpreter import interpreter_builder as builder

        builder.options = replace(builder.options, sanitize_overflow=False)
    except (ImportError, AttributeError, TypeError):
        pass  # slower, but as right


torch.backends.cudnn.allow_tf32 = False  # the reference in float32 is what others are held to
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    quicken_interpreter()
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # more threads than cores wait for one another
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))

from t2ct.ops import norm_cpu, use_backend  # noqa: E402  after the switch
from t2ct.ops.dispatch import native, why_not  # noqa: E402

LONG = ("test_train_ranks", "test_train_shard", "test_train_memory", "test_train_cli", "test_wide_offsets")


def pytest_configure(config):
    # xdist hands out files with many tests first, which are the quick ones: a slow one would be left for last, alone
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` takes its pick
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)  # the last letters' long files would be left for last
    for item in items:
        if getattr(item.module, "DEVICE", "cpu") == "cuda":  # files that test on the GPU where there is one
            item.add_marker(pytest.mark.gpu)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is False"))

pytest_plugins = ["small"]  # the fixture `published`


@pytest.fixture(params=("avx512", "avx2", "portable"))
def isa(request, monkeypatch):
    """The compiled kernels of one instruction set, forced."""
    if native() is None:
        pytest.skip(why_not("cpu", "cpu", torch.float32))
    if request.param not in native().isas():
        built = request.param in native().compiled_isas
        pytest.skip(f"{request.param} is compiled, but this machine has none" if built else f"no {request.param} built")
    monkeypatch.setattr(norm_cpu, "ISA", native().isas().index(request.param))
    torch.manual_seed(0)
    with use_backend("cpu"):
        yield


@pytest.fixture
def one_thread():
    """torch with one thread: networks of a few voxels only wait for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
