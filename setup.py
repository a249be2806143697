"""The one extension, t2ct._C, and where t2ct.kernels lives; everything else is in pyproject.toml.

The extension is optional: without a compiler, or where it fails to build, the package installs all the same and every
op runs on its reference backend; `pip install -v` prints the reason, `t2ct explain` the consequence.
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
LINK = ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-s"])]

# One unit per instruction set: only the unit that is chosen at run time may hold its instructions.
UNITS = {
    "csrc/bind.cpp": [],
    "csrc/cpu/conv.cpp": OPENMP,
    "csrc/cpu/conv_portable.cpp": [],
    "csrc/cpu/norm.cpp": OPENMP,
    "csrc/cpu/norm_portable.cpp": [],
}
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
BFLOAT16_UNIT, BFLOAT16_FLAG = "csrc/cpu/conv_avx512bf16.cpp", "-mavx512bf16"  # gcc 10, clang 9 and later have it
if X86:
    FLAGS.append("-DT2CT_X86")
    UNITS |= {
        "csrc/cpu/conv_avx2.cpp": AVX2,
        "csrc/cpu/conv_avx512.cpp": AVX512,
        BFLOAT16_UNIT: [*AVX512, BFLOAT16_FLAG],
        "csrc/cpu/norm_avx2.cpp": AVX2,
        "csrc/cpu/norm_avx512.cpp": AVX512,
    }
HEADERS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.h"))


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


def escape(path: object) -> str:
    """A path in a ninja build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(target: Path, objects: Path) -> str:
    import pybind11

    units = dict(UNITS)
    flags = list(FLAGS)
    if BFLOAT16_UNIT in units and accepts(BFLOAT16_FLAG):
        flags.append("-DT2CT_BFLOAT16")
    else:
        units.pop(BFLOAT16_UNIT, None)
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
    built = []
    for source, unit in units.items():
        built.append(objects / (Path(source).stem + ".o"))
        lines += [f"build {escape(built[-1])}: compile {escape(ROOT / source)}", f"  unit = {' '.join(unit)}"]
    lines += [f"build {escape(target)}: link {' '.join(map(escape, built))}", ""]
    return "\n".join(lines)


class NinjaBuild(build_ext):
    """Compiles the extension by a generated build.ninja; a failure costs one sentence, not the installation."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp).resolve() / "ninja"
        try:
            objects.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            (objects / "build.ninja").write_text(ninja_file(target, objects))
            subprocess.run([find_ninja(), "-C", str(objects)], check=True)
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            print(f"t2ct: the compiled extension t2ct._C was not built ({error}); every op will run on its slower "
                  "reference backend, and `t2ct explain` will say so.", file=sys.stderr)


setup(
    packages=[*find_packages(include=["t2ct", "t2ct.*"]), "t2ct.kernels"],
    package_dir={"t2ct.kernels": "kernels"},
    package_data={"t2ct": ["assets/**/*.json", "assets/**/*.safetensors"]},
    ext_modules=[Extension("t2ct._C", sources=list(UNITS), depends=HEADERS, optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
