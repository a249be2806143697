"""What pip installs is what the tree holds, and the compiled module leans on nothing it should not."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IGNORED = {"__pycache__"}


def tree():
    """Every file that belongs in a wheel, by its path there."""
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "t2ct").rglob("*.py")}
    files |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "t2ct/assets/embedded").rglob("*") if p.is_file()}
    files |= {"t2ct/" + p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*.py")}
    return {f for f in files if not IGNORED.intersection(f.split("/"))}


@pytest.mark.slow
def test_wheel_holds_the_tree(tmp_path):
    for tool in ("setuptools", "pybind11", "ninja"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed")
    source = tmp_path / "source"  # a copy: building leaves files behind
    source.mkdir()
    tracked = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "kernels", "t2ct")
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in tracked), str(source)], check=True)
    for built in source.glob("t2ct/_C*"):
        built.unlink()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("t2ct-*.whl"))) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
        scripts = next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))
        assert "t2ct = t2ct.cli:main" in wheel.read(scripts).decode()
    native = {n for n in names if n.startswith("t2ct/_C.")}
    assert names - native == tree()
    assert len(native) == 1, "t2ct._C was not built"


def test_every_folder_of_code_is_a_package():
    """A folder without __init__.py would be missing from the wheel."""
    for path in (ROOT / "t2ct").rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} lacks __init__.py"


def test_assets_are_packaged():
    """setup.py names the suffixes of the embedded model; another would be left out silently."""
    for path in (ROOT / "t2ct/assets/embedded").rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors"), f"{path} is not in setup.py's package_data"


def test_extension_stands_alone():
    """No symbol or library of torch or CUDA: one build serves every torch, with or without a GPU. The module is
    stripped, so its bytes hold no names but those that the loader resolves, and its own texts."""
    spec = importlib.util.find_spec("t2ct._C")
    if spec is None:
        pytest.skip("t2ct._C was not built")
    content = Path(spec.origin).read_bytes()
    for name in (b"N2at", b"N3c10", b"_ZN5torch", b"cudaMalloc", b"cudaLaunch", b"libtorch", b"libc10", b"libcudart"):
        assert name not in content, name
    assert b"pybind11" in content  # the bytes are those of the module


def test_version_in_one_place():
    import t2ct

    assert t2ct.__version__.count(".") == 2
    try:
        installed = importlib.metadata.version("t2ct")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("t2ct is not installed, only on the path")
    assert installed == t2ct.__version__


def test_constraints_name_every_dependency():
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {Requirement(line).name for line in lines if line and not line.startswith("#")}
    if sys.version_info >= (3, 11):
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = project["dependencies"] + project["optional-dependencies"]["test"]
        assert {Requirement(r).name for r in wanted} <= pinned
