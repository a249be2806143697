"""The house keeps its shape: who may import whom, files short enough to read, folders small enough to see."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# csrc, kernels <- ops <- stream <- models <- diffusion <- pipeline, train, eval <- cli: a layer imports those before it
# and its own.
LAYERS = (
    {"_C", "kernels"},
    {"ops"},
    {"stream"},
    {"models"},
    {"diffusion"},
    {"pipeline", "config", "checks", "weights", "train", "eval"},
    {"cli", "commands", "__main__", "__init__"},
)
# Beside the models: volumes, files and words, seen from the pipeline on, seeing only one another.
BESIDE = {"data", "files", "text"}
MAX_LINES, MAX_ENTRIES = 400, 16
ALLOWED_IN_KERNELS = ("torch", "triton", "math", "functools", "dataclasses")


def sources(*folders):
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in p.parts]


def imported(path):
    """Every module that a file imports, anywhere in it, as a dotted name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write from t2ct...., not a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def allowed(unit):
    if unit in BESIDE:
        return BESIDE
    layer = next(i for i, names in enumerate(LAYERS) if unit in names)
    return set().union(*LAYERS[: layer + 1], BESIDE if layer >= 5 else ())


@pytest.mark.parametrize("path", sources("t2ct"), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    unit = path.relative_to(ROOT / "t2ct").parts[0].removesuffix(".py")
    assert unit in BESIDE.union(*LAYERS), f"t2ct/{unit} has no place in the house: give it one in {__file__}"
    for name, line in imported(path):
        root, _, rest = name.partition(".")
        assert root not in ("tests", "benchmarks", "conftest", "cases"), f"{path}:{line} imports {name}"
        target = rest.partition(".")[0]
        if root == "t2ct" and target and not (target.startswith("__") and target.endswith("__")):
            assert target in allowed(unit), f"{path}:{line}: {unit} may not import {name}"


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda p: p.name)
def test_kernels_import_only_torch_and_triton(path):
    for name, line in imported(path):
        good = name.startswith("t2ct.kernels.") or name.split(".")[0] in ALLOWED_IN_KERNELS
        assert good, f"{path}:{line} imports {name}"


def test_kernels_init_is_a_docstring():
    body = ast.parse((ROOT / "kernels/__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0].value, ast.Constant)


def test_a_wrong_arrow_is_seen():
    assert "pipeline" not in allowed("models") and "models" not in allowed("data") and "data" not in allowed("models")
    assert "ops" in allowed("models") and "stream" in allowed("models") and "data" in allowed("cli")
    assert "models" not in allowed("stream") and "train" not in allowed("diffusion") and "cli" not in allowed("train")


def test_runtime_imports_are_dependencies():
    """Nothing that a user may lack is imported by the package; tests' own tools stay in the tests."""
    for path in sources("t2ct"):
        for name, line in imported(path):
            assert name.split(".")[0] not in ("scipy", "matplotlib", "monai", "pytest", "hypothesis"), f"{path}:{line}"


def test_files_and_folders_stay_small():
    code = [*sources("t2ct", "kernels", "tests", "benchmarks"), *(ROOT / "csrc").rglob("*.[ch]*"), ROOT / "setup.py"]
    long = {str(p.relative_to(ROOT)): n for p in code if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines, so two things: {long}"
    folders = [p for top in ("csrc", "kernels", "t2ct") for p in [ROOT / top, *(ROOT / top).rglob("*")] if p.is_dir()]
    for folder in folders:
        entries = [p.name for p in folder.iterdir() if not p.name.startswith("_")]
        assert len(entries) <= MAX_ENTRIES, f"{folder} has {len(entries)} entries: {sorted(entries)}"
