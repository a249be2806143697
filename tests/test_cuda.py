"""csrc/cuda: what is embedded, how it is loaded and built; the arithmetic of merge_partials. Mostly without a GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

from t2ct.ops import explain_rows, group_stats, merge, merge_partials, use_backend
from t2ct.ops.dispatch import UNPROVEN, _why_not, choose, native, serves, why_not

ROOT = Path(__file__).resolve().parent.parent
# samples, tiles, channels, groups: groups of 1, 2, 3, 16 and 300 channels; one tile, and more than threads divide
SHAPES = [(1, 1, 4, 4), (2, 1, 32, 16), (2, 3, 6, 2), (1, 257, 32, 2), (2, 1000, 9, 3), (1, 8192, 64, 32),
          (2, 8192, 4, 4), (1, 7, 600, 2), (2, 129, 32, 1)]
needs_module = pytest.mark.skipif(native() is None, reason="t2ct._C was not built")


@pytest.fixture
def kernels():
    """t2ct._C with CUDA kernels."""
    if native() is None or not native().cuda_targets:
        pytest.skip(why_not("cuda", "cuda", torch.float32))
    return native()


def emulated(mean, m2, count, groups, eps):
    out = torch.empty(mean.shape[0], groups), torch.empty(mean.shape[0], groups)
    native().merge_stats_emulated((*mean.shape, groups), mean.data_ptr(), m2.data_ptr(), count.data_ptr(), eps,
                                  *(t.data_ptr() for t in out))
    return out


def partials(shape, mean=0.0, spread=1.0):
    """Tiles whose means lie about `mean`, of 1 to 512 voxels, some of none at all and full of NaN."""
    n, tiles, channels, _ = shape
    torch.manual_seed(tiles)
    count = torch.randint(1, 513, (tiles,)).float()
    means, m2 = mean + spread * torch.randn(n, tiles, channels), torch.rand(n, tiles, channels) * count[:, None]
    count[3::5] = 0
    means[:, 3::5], m2[:, 3::5] = torch.nan, torch.nan
    return means, m2, count


def exact(mean, m2, count, groups, eps):
    """In float64, group by group, by the definition."""
    n, _, channels = mean.shape
    some = count > 0
    weight = count[some].double()[:, None].expand(-1, channels // groups)
    out = torch.empty(2, n, groups, dtype=torch.float64)
    for i in range(n):
        for g in range(groups):
            channel = slice(g * channels // groups, (g + 1) * channels // groups)
            m, s = mean[i, some, channel].double(), m2[i, some, channel].double()
            average = (weight * m).sum() / weight.sum()
            variance = (s + weight * (m - average) ** 2).sum() / weight.sum()
            out[0, i, g], out[1, i, g] = average, (variance + eps) ** -0.5
    return out


def close(ours, theirs):
    """Half an ulp of float32 from rounding, and for the mean what double loses near 0."""
    bound = 2**-24 * 1.001 * theirs.abs()
    bound[0] += 1e-12 / theirs[1]
    return all(((a.double() - b).abs() <= c).all() for a, b, c in zip(ours, theirs, bound, strict=True))


# --------------------------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("run", [pytest.param(emulated, marks=needs_module), merge_partials], ids=["emulated", "op"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mean,spread", [(0, 1), (1000, 1), (-1e6, 0.5), (3, 0)])
def test_matches_float64(run, shape, mean, spread):
    tensors = partials(shape, mean, spread)
    assert close(run(*tensors, shape[3], 1e-6), exact(*tensors, shape[3], 1e-6))


@needs_module
@pytest.mark.parametrize("shape", [(2, 1000, 9, 3), (2, 129, 32, 1)], ids=str)
def test_bits_depend_on_the_groups_own_numbers_alone(shape):
    """Not on its neighbours in the batch or among the channels, nor on where the tensors lie."""
    mean, m2, count = partials(shape, 1000)
    n, _, channels, groups = shape
    whole, width = emulated(mean, m2, count, groups, 1e-6), channels // groups
    for i in range(n):
        for g in range(groups):
            part = [t[i:i + 1, :, g * width:(g + 1) * width].contiguous() for t in (mean, m2)]
            alone = emulated(*part, torch.cat([count[:1], count])[1:], 1, 1e-6)
            assert all(torch.equal(a[i, g], b[0, 0]) for a, b in zip(whole, alone, strict=True))


@needs_module
@pytest.mark.parametrize("run", [emulated, merge_partials])
def test_no_voxel_and_nan(run):
    mean, m2, count = torch.zeros(1, 2, 4), torch.ones(1, 2, 4), torch.tensor([1.0, 3.0])
    assert all(t.isnan().all() for t in run(mean, m2, torch.zeros(2), 2, 1e-6))
    for bad in (torch.nan, torch.inf):
        mean[0, 1, 3] = bad
        out_mean, rstd = run(mean, m2, count, 2, 1e-6)
        assert out_mean[0, 0] == 0 and rstd[0, 0].isfinite()
        assert not out_mean[0, 1].isfinite() and not rstd[0, 1].isfinite()


def test_merges_what_group_stats_takes_of_the_whole():
    x = torch.randn(2, 12, 8, 9, 10) + 1000
    tiles = [tile for slab in x.split(3, 2) for tile in slab.split(4, 3)]
    stats = [torch.var_mean(t.double().flatten(2), 2, correction=0) for t in tiles]
    count = torch.tensor([float(t[0, 0].numel()) for t in tiles])
    mean = torch.stack([m for _, m in stats], 1).float()
    m2 = (torch.stack([v for v, _ in stats], 1) * count[:, None]).float()
    ours, (theirs, theirs_m2, numbers) = merge_partials(mean, m2, count, 4, 1e-5), group_stats(x, 4)
    assert ((ours[0] - theirs).abs() <= 1e-4).all()
    assert ((ours[1] / (theirs_m2 / numbers + 1e-5).rsqrt() - 1).abs() <= 1e-5).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpu_equals_its_emulation(kernels, shape):
    tensors = partials(shape, 1000)
    with use_backend("cuda"):
        ours = merge_partials(*(t.cuda() for t in tensors), shape[3])
        again = merge_partials(*(t.cuda() for t in tensors), shape[3])
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            third = merge_partials(*(t.cuda() for t in tensors), shape[3])
        side.synchronize()
    for result in (ours, again, third):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(result, emulated(*tensors, shape[3], 1e-6), strict=True))


# ---------------------------------------------------------------------------------------------- contract, dispatch


def test_bad_input():
    mean, count = torch.zeros(2, 3, 6), torch.ones(3)
    for bad, groups in ((mean, 4), (mean, 0), (mean[0], 2), (mean[:, :0], 2)):
        with pytest.raises(ValueError, match=r"merge_partials: mean must be non-empty, \(N, T, C\).*groups=\d, got \("):
            merge_partials(bad, bad, count, groups)
    with pytest.raises(ValueError, match=r"m2 must be \(2, 3, 6\) on cpu, got \(1, 3, 6\) on cpu"):
        merge_partials(mean, mean[:1], count, 2)
    with pytest.raises(ValueError, match=r"count must be \(3,\) on cpu, got \(3,\) on meta"):
        merge_partials(mean, mean, count.to("meta"), 2)
    with pytest.raises(TypeError, match=r"count must be torch.float32, got torch.int64"):
        merge_partials(mean, mean, count.long(), 2)


def test_registration():
    mean, m2, count = partials((2, 5, 6, 2))
    torch.library.opcheck(torch.ops.t2ct.merge_partials, (mean, m2, count, 2, 1e-6))
    compiled = torch.compile(merge_partials, fullgraph=True, backend="aot_eager")
    wide = mean.mT.contiguous().mT  # not contiguous
    for run in (compiled, merge_partials):
        assert all(map(torch.equal, run(wide, m2, count, 2), merge_partials(mean, m2, count, 2)))


def test_explained(monkeypatch):
    assert "cuda" in UNPROVEN and why_not("cuda", "cpu", torch.float32) == "the tensors are on cpu"
    assert choose("merge_partials", merge.MERGE, torch.zeros(1, 1, 1))[0] == "reference"
    with use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' cannot run: the tensors are on cpu"):
        merge_partials(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.ones(1), 1)
    row = next(r for r in explain_rows("cpu") if r[1] == "merge_partials")
    assert row[2] == "reference" and "cuda: the tensors are on cpu" in row[3]
    if native() is not None and not torch.cuda.is_available():
        row = next(r for r in explain_rows("cuda") if r[1] == "merge_partials")
        assert re.search("cuda: (t2ct._C was built without CUDA|libcuda.so.1|the CUDA driver|torch sees)", row[3])


def test_which_gpu_a_target_serves():
    served = {"sm_80": [(8, 0), (8, 6), (8, 9)], "sm_90a": [(9, 0)], "sm_100a": [(10, 0)],
              "compute_80": [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]}
    for target, capabilities in served.items():
        assert [c for c in [(7, 5), *served["compute_80"]] if serves(target, c)] == capabilities


@pytest.mark.parametrize("targets,driver,capability,reason", [
    ([], "", (9, 0), r"t2ct._C was built without CUDA kernels \(nvcc was not found\)"),
    (["sm_80"], "no driver", (9, 0), "no driver"),
    (["sm_80", "sm_90a"], "", (10, 0), r"built for sm_80, sm_90a, not for compute capability \(10, 0\)"),
    (["sm_80", "sm_90a"], "", (9, 0), None),
])
def test_reasons(monkeypatch, targets, driver, capability, reason):
    class Module:
        cuda_targets, cuda_absent = targets, "nvcc was not found"

        def cuda_driver_missing(self):
            return driver

    monkeypatch.setattr("t2ct.ops.dispatch._C", Module())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    given = _why_not("cuda", "cuda", torch.float32)
    assert given == reason if reason is None else re.search(reason, given)


# ------------------------------------------------------------------------------------------- the module, its driver


def cuobjdump(*args):
    tool = shutil.which("cuobjdump")
    if not tool and (triton := importlib.util.find_spec("triton")):
        tool = str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    if not tool or not Path(tool).exists():
        pytest.skip("no cuobjdump: it is on no PATH and triton is not installed")
    return subprocess.run([tool, *args, native().__file__], capture_output=True, text=True, check=True).stdout


def test_what_is_embedded(kernels):
    listed = cuobjdump("-lelf", "-lptx")
    for target in kernels.cuda_targets:
        assert (f".{target}.cubin" if target.startswith("sm_") else f".sm_{target[8:]}.ptx") in listed, target
    usage = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", cuobjdump("-res-usage"))
    assert len(usage) == sum(t.startswith("sm_") for t in kernels.cuda_targets)
    for registers, stack, local in usage:
        assert stack == local == "0" and int(registers) <= 64


ALONE = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("t2ct._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "libcuda" not in open("/proc/self/maps").read()
mean, m2, count = np.float32([[[1, 2]] * 3] * 5), np.ones((5, 3, 2), np.float32), np.ones(3, np.float32)
out = np.zeros((2, 2, 5, 2), np.float32)
pointers = [a.ctypes.data for a in (mean, m2, count)]
try:
    for stream in (7, 8):
        module.merge_stats((5, 3, 2, 2), *pointers, 1e-6, out[0, 0].ctypes.data, out[0, 1].ctypes.data, 3, stream)
    module.merge_stats_emulated((5, 3, 2, 2), *pointers, 1e-6, out[1, 0].ctypes.data, out[1, 1].ctypes.data)
    assert (out[0] == out[1]).all() and (out[0, 0] == [1, 2]).all()
except RuntimeError as error:
    print(error)
"""


def alone(**env):
    """What a process prints that has the module, and neither torch nor t2ct; unbuffered, since C prints there too."""
    command = [sys.executable, "-c", ALONE, native().__file__]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | env | {"PYTHONUNBUFFERED": "1"})
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="CUDA kernels are built on Linux")
def test_without_a_driver(kernels):
    if not kernels.cuda_driver_missing():
        pytest.skip("there is a driver")
    assert len(kernels.cuda_driver_missing().splitlines()) == 1
    assert alone() == [f"t2ct_merge_stats cannot run: {kernels.cuda_driver_missing()}"]


def test_with_a_fake_driver(kernels, tmp_path):
    """Each call that a driver gets: once per device to load, the caller's stream, grid, block and arguments."""
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    command = ["c++", "-shared", "-fPIC", "-std=c++17", "-ffp-contract=off", "tests/fake_driver.cpp"]
    subprocess.run([*command, "-o", tmp_path / "libcuda.so.1"], check=True, cwd=ROOT)
    fake = {"LD_LIBRARY_PATH": str(tmp_path)}
    assert alone(**fake) == ["retain", "stream 7, 10 blocks of 256", "stream 8, 10 blocks of 256"]
    assert alone(**fake, FAKE_CUDA="cuInit") == [
        "t2ct_merge_stats cannot run: the CUDA driver did not start: CUDA_ERROR_NO_DEVICE"]
    assert alone(**fake, FAKE_CUDA="cuDeviceGet") == ["device 3: CUDA_ERROR_NO_DEVICE"]
    assert alone(**fake, FAKE_CUDA="cuModuleLoadData")[1:] == [
        "t2ct_merge_stats did not load on device 3 (driver for CUDA 13.1): CUDA_ERROR_NO_DEVICE"]
    assert alone(**fake, FAKE_CUDA="cuLaunchKernel")[2:] == ["t2ct_merge_stats was not launched: CUDA_ERROR_NO_DEVICE"]


# -------------------------------------------------------------------------------------------------------- the build


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module; setup() itself does nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("t2ct_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("wish,sentence", [
    ("1", "t2ct: T2CT_CUDA=1, but the CUDA kernels were not built: nvcc was not found"),
    ("yes", "t2ct: T2CT_CUDA must be 0, 1 or unset, got 'yes'"),
])
@pytest.mark.skipif(sys.platform != "linux", reason="CUDA kernels are built on Linux")
def test_demanded_kernels_or_no_build(build, monkeypatch, tmp_path, wish, sentence):
    monkeypatch.setenv("T2CT_CUDA", wish)
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    command = build.NinjaBuild(setuptools.Distribution())
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "tmp")
    command.inplace = False
    command.extensions = []
    with pytest.raises(SystemExit) as stopped:
        command.build_extension(setuptools.Extension("t2ct._C", sources=[]))
    assert str(stopped.value) == sentence


def test_targets_that_nvcc_does_not_know_are_left_out(build, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\ncase \"$*\" in *100a*) exit 1;; esac\n")
    nvcc.chmod(0o755)
    assert build.known_targets(str(nvcc)) == ["sm_80", "sm_90a", "compute_80"]
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(RuntimeError, match="nvcc knows none of sm_80, sm_90a, sm_100a, compute_80"):
        build.known_targets(str(nvcc))


@pytest.mark.slow
def test_build_without_cuda(build, monkeypatch, tmp_path, capfd):
    """T2CT_CUDA=0, and an nvcc that fails, cost the CUDA kernels alone."""
    pytest.importorskip("pybind11")
    target, objects = tmp_path / f"_C{build.sysconfig.get_config_var('EXT_SUFFIX')}", tmp_path / "objects"
    objects.mkdir()
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\ncase \"$*\" in *dryrun*) ;; *) exit 1;; esac\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(build, "find_nvcc", lambda: str(nvcc))
    show = (f"import importlib.util as u; s = u.spec_from_file_location('t2ct._C', {str(target)!r}); "
            "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.cuda_targets, m.cuda_absent, m.isas()[-1])")
    for wish, reason in (("0", "T2CT_CUDA=0"), ("", "nvcc failed")):
        build.build_module(target, objects, wish)
        assert f"t2ct._C is built without CUDA kernels ({reason}); everything else works." in capfd.readouterr().err
        shown = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True).stdout
        assert shown == f"[] {reason} portable\n"
    with pytest.raises(subprocess.CalledProcessError):
        build.build_module(target, objects, "1")
