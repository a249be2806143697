"""The one extension, t2ct._C, and where t2ct.kernels lives; everything else is in pyproject.toml.

The extension is optional: without a compiler, or where it fails to build, the package installs all the same and every
op runs on its reference backend; `pip install -v` prints the reason, `t2ct explain` the consequence.

CUDA kernels are built where nvcc is found. T2CT_CUDA=0 leaves them out; with T2CT_CUDA=1 a build without them fails.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wno-uninitialized",
         "-Wno-maybe-uninitialized"]  # gcc 12's own AVX-512 headers warn
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
LINK = ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-s", "-ldl"])]

EXACT = ["-ffp-contract=off"]  # a part of a result has the bits of the whole; merge.cu's are emulated

# One unit per instruction set: only the unit that is chosen at run time may hold its instructions.
UNITS = {
    "csrc/bind.cpp": [],
    "csrc/cpu/conv/conv.cpp": OPENMP,
    "csrc/cpu/conv/portable.cpp": [],
    "csrc/cpu/narrow/narrow.cpp": OPENMP,
    "csrc/cpu/narrow/portable.cpp": EXACT,
    "csrc/cpu/norm/norm.cpp": OPENMP,
    "csrc/cpu/norm/portable.cpp": [],
    "csrc/cpu/resample/resample.cpp": OPENMP,
    "csrc/cpu/resample/portable.cpp": EXACT,
    "csrc/cpu/winograd/winograd.cpp": OPENMP,
    "csrc/cpu/winograd/portable.cpp": EXACT,
    "csrc/cuda/merge.cpp": EXACT,
}
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
BFLOAT16_UNIT, BFLOAT16_FLAG = "csrc/cpu/conv/avx512bf16.cpp", "-mavx512bf16"  # gcc 10, clang 9 and later have it
if X86:
    FLAGS.append("-DT2CT_X86")
    UNITS |= {
        "csrc/cpu/conv/avx2.cpp": AVX2,
        "csrc/cpu/conv/avx512.cpp": AVX512,
        BFLOAT16_UNIT: [*AVX512, BFLOAT16_FLAG],
        "csrc/cpu/narrow/avx2.cpp": [*AVX2, *EXACT],
        "csrc/cpu/narrow/avx512.cpp": [*AVX512, *EXACT],
        "csrc/cpu/norm/avx2.cpp": AVX2,
        "csrc/cpu/norm/avx512.cpp": AVX512,
        "csrc/cpu/resample/avx2.cpp": [*AVX2, *EXACT],
        "csrc/cpu/resample/avx512.cpp": [*AVX512, *EXACT],
        "csrc/cpu/winograd/avx2.cpp": [*AVX2, *EXACT],
        "csrc/cpu/winograd/avx512.cpp": [*AVX512, *EXACT],
    }
DEPENDS = sorted(str(p.relative_to(ROOT)) for pattern in ("**/*.h", "cuda/*.c*") for p in ROOT.glob("csrc/" + pattern))

# Kernels for the GPU: csrc/cuda/NAME.cu becomes a fatbin at the symbol t2ct_image_NAME.
CUDA_UNITS = {"csrc/cuda/merge.cu": ["-fmad=false"]}
CUDA_TARGETS = ("sm_80", "sm_90a", "sm_100a", "compute_80")  # the last is PTX, for every GPU from 8.0 on
NVCC_FLAGS = ["-std=c++17", "-fatbin", "-allow-unsupported-compiler"]  # the host compiler only preprocesses


def find_ninja() -> str:
    """ninja from the package of that name (pip's isolated build has it), or from PATH."""
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        pass
    found = shutil.which("ninja")
    if not found:
        raise RuntimeError("ninja was not found")
    return found


def find_compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise RuntimeError("no C++ compiler was found")


def accepts(flag: str) -> bool:
    """Does the compiler know this flag?"""
    command = [*find_compiler().split(), flag, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=b"", capture_output=True).returncode == 0


def find_nvcc() -> str:
    """nvcc from PATH, or where its installers put it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), *(f"{h}/bin" for h in homes if h)]))
    if not found:
        raise RuntimeError("nvcc was not found")
    return found


def generate(target: str) -> list[str]:
    """nvcc's flags for one of CUDA_TARGETS."""
    return ["-gencode", f"arch={target.replace('sm_', 'compute_')},code={target}"]


def known_targets(nvcc: str) -> list[str]:
    """Those of CUDA_TARGETS that this nvcc can make; `--list-gpu-code` would not list sm_90a."""
    def knows(target: str) -> bool:
        command = [nvcc, "--dryrun", *NVCC_FLAGS, *generate(target), "-x", "cu", os.devnull, "-o", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0

    targets = [t for t in CUDA_TARGETS if knows(t)]
    if not targets:
        raise RuntimeError(f"nvcc knows none of {', '.join(CUDA_TARGETS)}")
    return targets


def cuda_lines(objects: Path, nvcc: str, targets: list[str]) -> list[str]:
    """ninja's lines from .cu files to cuda.o, which holds their fatbins; `ninja cuda` builds just that."""
    images, assembly = [], []
    for source in CUDA_UNITS:
        images.append(objects / (Path(source).stem + ".fatbin"))
        symbol = f"t2ct_image_{Path(source).stem}"
        assembly += ['.section .nv_fatbin, "a"', ".balign 16", f".globl {symbol}", f".hidden {symbol}", f"{symbol}:",
                     f'.incbin "{images[-1].name}"']
    (objects / "cuda.S").write_text("\n".join([*assembly, '.section .note.GNU-stack, "", %progbits', ""]))
    return [
        f'nvcc = "{nvcc}"',
        "rule cuda",
        f"  command = $nvcc {' '.join(NVCC_FLAGS + [f for t in targets for f in generate(t)])} $unit "
        "-MMD -MF $out.d $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule embed",
        "  command = $cxx -c $in -o $out",
        *(line for image, (source, unit) in zip(images, CUDA_UNITS.items(), strict=True)
          for line in (f"build {escape(image)}: cuda {escape(ROOT / source)}", f"  unit = {' '.join(unit)}")),
        f"build {escape(objects / 'cuda.o')}: embed cuda.S | {' '.join(map(escape, images))}",
        f"build cuda: phony {escape(objects / 'cuda.o')}",
    ]


def escape(path: object) -> str:
    """A path in a ninja build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(target: Path, objects: Path, *, nvcc: str = "", absent: str = "") -> str:
    """Without nvcc the module holds no CUDA kernels, and `absent` says why."""
    import pybind11

    units = dict(UNITS)
    flags = list(FLAGS)
    if BFLOAT16_UNIT in units and accepts(BFLOAT16_FLAG):
        flags.append("-DT2CT_BFLOAT16")
    else:
        units.pop(BFLOAT16_UNIT, None)
    cuda = []
    if nvcc:
        targets = known_targets(nvcc)
        cuda = cuda_lines(objects, nvcc, targets)
        names = ",".join(f'"{t}"' for t in targets)
        define = f"-DT2CT_CUDA='{names}'"
        units |= {"csrc/cuda/driver.cpp": []}
    else:
        define = f"-DT2CT_CUDA_ABSENT='\"{absent}\"'"
    for unit in ("csrc/bind.cpp", "csrc/cuda/merge.cpp"):
        units[unit] = [*units[unit], define]
    includes = (pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude"))
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {find_compiler()}",
        "flags = " + " ".join([*flags, *(f'-I"{i}"' for i in dict.fromkeys(includes))]),
        "rule compile",
        "  command = $cxx $flags $unit -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in {' '.join([*LINK, *OPENMP])} -o $out",
    ]
    built = [objects / "cuda.o"] if nvcc else []
    for source, unit in units.items():
        built.append(objects / ("_".join(Path(source).parts[1:]) + ".o"))
        lines += [f"build {escape(built[-1])}: compile {escape(ROOT / source)}", f"  unit = {' '.join(unit)}"]
    lines += [*cuda, f"build {escape(target)}: link {' '.join(map(escape, built))}", ""]
    return "\n".join(lines)


class NinjaBuild(build_ext):
    """Compiles the extension by a generated build.ninja; a failure costs one sentence, not the installation, unless
    T2CT_CUDA=1 demands the kernels."""

    def build_extension(self, ext: Extension) -> None:
        wish = os.environ.get("T2CT_CUDA", "")
        if wish not in ("", "0", "1"):
            raise SystemExit(f"t2ct: T2CT_CUDA must be 0, 1 or unset, got {wish!r}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp).resolve() / "ninja"
        try:
            objects.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            build_module(target, objects, wish)
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if wish == "1":
                raise SystemExit(f"t2ct: T2CT_CUDA=1, but the CUDA kernels were not built: {error}") from None
            print(f"t2ct: the compiled extension t2ct._C was not built ({error}); every op will run on its slower "
                  "reference backend, and `t2ct explain` will say so.", file=sys.stderr)


def build_module(target: Path, objects: Path, wish: str) -> None:
    def ninja(text: str, *goals: str) -> None:
        (objects / "build.ninja").write_text(text)
        subprocess.run([find_ninja(), "-C", str(objects), *goals], check=True)

    absent = "T2CT_CUDA=0" if wish == "0" else "not on Linux" if sys.platform != "linux" else ""
    try:
        if absent:
            raise RuntimeError(absent)
        text = ninja_file(target, objects, nvcc=find_nvcc())
        ninja(text, "cuda")  # alone, so that a failure is known to be nvcc's
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        if wish == "1":
            raise
        absent = absent or ("nvcc failed" if isinstance(error, subprocess.CalledProcessError) else str(error))
        print(f"t2ct: t2ct._C is built without CUDA kernels ({absent}); everything else works.", file=sys.stderr)
        text = ninja_file(target, objects, absent=absent)
    ninja(text)


setup(
    packages=[*find_packages(include=["t2ct", "t2ct.*"]), "t2ct.kernels"],
    package_dir={"t2ct.kernels": "kernels"},
    package_data={"t2ct": ["assets/embedded/*.json", "assets/embedded/*.safetensors"]},
    ext_modules=[Extension("t2ct._C", sources=list(UNITS), depends=DEPENDS, optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
