"""The command line: help at once, one line per error, exit codes, and files that are whole or absent."""

import json
import os
import re
import subprocess
import sys
import types

import nibabel as nib
import numpy as np
import pytest

from t2ct.cli import main
from t2ct.data.volume import Volume

COMMANDS = ("generate", "phantom", "explain", "info")


class FakePipeline:
    """Stands in for the networks: the interface that `t2ct generate` and `t2ct info` use, and nothing behind it."""

    name, device, dtype, size, spacing = "fake", "cpu", "torch.float32", (16, 16, 8), (20.0, 20.0, 40.0)
    loaded: tuple = ()

    @classmethod
    def from_pretrained(cls, path, device=None, dtype=None):
        if path == "nowhere":
            raise FileNotFoundError(f"model: wanted a folder,\n got {path!r}")
        cls.loaded = (path, device, dtype)
        return cls()

    def estimate_seconds(self, size, num_inference_steps):
        return 0.5 * num_inference_steps

    def info(self):
        return {"name": self.name, "size": "16 x 16 x 8 voxels", "parameters": 3}


@pytest.fixture
def pipeline(monkeypatch):
    """A module t2ct.pipeline that answers at once and remembers how it was called."""
    module = types.ModuleType("t2ct.pipeline")
    module.calls = []

    def generate(text, **options):
        module.calls.append((text, options))
        rng = np.random.default_rng(options["seed"])
        hu = rng.integers(-1000, 1000, options["size"]).astype(np.int16)
        provenance = {"steps": options["num_inference_steps"], "guidance": options["guidance_scale"], "weights": "ab12"}
        return Volume(hu, np.diag([*options["spacing"], 1.0]), str(text), options["seed"] or 5, provenance)

    module.generate, module.T2CTPipeline = generate, FakePipeline
    monkeypatch.setitem(sys.modules, "t2ct.pipeline", module)
    return module


def run(*words):
    return subprocess.run([sys.executable, "-m", "t2ct", *words], capture_output=True, text=True, timeout=60)


def test_a_reader_that_has_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "t2ct", "explain"], stdout=write, stderr=subprocess.PIPE, timeout=300)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys, time\nstart = time.perf_counter()\nfrom t2ct.cli import main\n"
        f"code = main({[*words, '--help']!r})\n"
        "heavy = {'torch', 'numpy', 'nibabel', 'PIL', 'tokenizers'} & set(sys.modules)\n"
        "print(time.perf_counter() - start, file=sys.stderr)\n"
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: t2ct" in done.stdout
    assert float(done.stderr) < 2  # generous: a quarter of a second where nothing else runs


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


def test_version():
    done = run("--version")
    assert done.returncode == 0 and done.stdout.startswith("t2ct ") and len(done.stdout.split()) == 2


def test_explain(capsys):
    assert main(["explain", "--device", "cpu"]) == 0
    assert "backend" in capsys.readouterr().out
    assert main(["explain", "--device", "fpga"]) == 2
    assert capsys.readouterr().err == "t2ct: error: device: wanted cpu or cuda, got 'fpga'\n"


def test_info(pipeline, capsys):
    assert main(["info", "vae=a,unet=b,clip=c,tokenizer=d"]) == 0
    assert FakePipeline.loaded[0] == {"vae": "a", "unet": "b", "clip": "c", "tokenizer": "d"}
    assert "parameters  3" in capsys.readouterr().out


def test_generate_writes_volume_json_and_picture(pipeline, tmp_path, capsys):
    out = tmp_path / "ct.nii.gz"
    words = ["--seed", "0", "--steps", "4", "--guidance", "2.5", "--guidance-interval", "0.2", "1"]
    words += ["--device", "cpu", "--dtype", "bfloat16"]
    grid = ["--size", "24", "16", "8", "--spacing", "12", "20", "40", "--negative-prompt", "Motion."]
    room = ["--memory", "2GB", "--spool", str(tmp_path)]
    assert main(["generate", "A nodule.", "-o", str(out), *words, *grid, *room]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ct.json", "ct.nii.gz", "ct.png"]
    text, options = pipeline.calls[0]
    assert text == "A nodule." and isinstance(options.pop("model"), FakePipeline)
    assert options == {
        "num_inference_steps": 4,
        "guidance_scale": 2.5,
        "guidance_interval": (0.2, 1.0),
        "seed": 0,
        "size": (24, 16, 8),
        "spacing": (12.0, 20.0, 40.0),
        "progress": True,
        "negative_prompt": "Motion.",
        "memory_budget": "2GB",
        "spool_dir": str(tmp_path),
    }
    assert [str(value) for value in FakePipeline.loaded] == ["None", "cpu", "torch.bfloat16"]
    image = nib.load(out)
    assert image.shape == (24, 16, 8) and image.header["descrip"].item().startswith(b"SYNTHETIC t2ct")
    content = json.loads((tmp_path / "ct.json").read_text())
    assert (content["steps"], content["guidance"], content["weights"]) == (4, 2.5, "ab12")
    before, after = capsys.readouterr().out.strip().splitlines()
    for fact in ("fake model", "cpu", "24 x 16 x 8 voxels", "4 steps", "about 2 s"):
        assert fact in before
    assert "ct.png" in after and "seed" in after


def test_generate_from_a_report_in_two_parts(pipeline, tmp_path, capsys):
    words = [
        "generate",
        "--findings",
        "A nodule.",
        "--impression",
        "Nodule.",
        "-o",
        str(tmp_path / "ct.nii"),
        "--quiet",
    ]
    assert main(words) == 0
    assert pipeline.calls[0][0] == {"findings": "A nodule.", "impression": "Nodule."}
    assert pipeline.calls[0][1]["size"] == FakePipeline.size
    assert capsys.readouterr().out == ""


def test_existing_files_are_replaced_only_when_told(pipeline, tmp_path, capsys):
    (tmp_path / "ct.png").write_bytes(b"mine")
    words = ["generate", "A nodule.", "-o", str(tmp_path / "ct.nii.gz"), "--quiet"]
    assert main(words) == 2
    assert "ct.png: wanted a new file, got one that exists" in capsys.readouterr().err
    assert not pipeline.calls and (tmp_path / "ct.png").read_bytes() == b"mine"
    assert main([*words, "--overwrite"]) == 0
    assert (tmp_path / "ct.png").read_bytes().startswith(b"\x89PNG")


BAD_GENERATE = {
    "empty prompt": ([""], "wanted a prompt"),
    "blank prompt": ([" \n "], "wanted a prompt"),
    "no prompt": ([], "wanted either TEXT or --findings and --impression, got neither"),
    "text and report": (["x", "--findings", "y"], "wanted either TEXT or --findings and --impression, got both"),
    "empty report": (["--findings", ""], "wanted a prompt"),
    "empty negative prompt": (["x", "--negative-prompt", ""], "wanted a prompt"),
    "no steps": (["x", "--steps", "0"], "argument --steps: wanted an integer from 1 to 1000, got '0'"),
    "half a step": (["x", "--steps", "1.5"], "argument --steps: wanted an integer from 1 to 1000, got '1.5'"),
    "negative seed": (["x", "--seed", "-1"], "argument --seed: wanted an integer from 0 to .*, got '-1'"),
    "huge seed": (["x", "--seed", str(2**64)], "argument --seed: wanted an integer from 0 to"),
    "NaN guidance": (["x", "--guidance", "nan"], "argument --guidance: wanted a finite number, got 'nan'"),
    "no interval": (["x", "--guidance-interval", "0.5", "2"], "--guidance-interval: wanted a number from 0 to 1"),
    "interval turned round": (["x", "--guidance-interval", "0.5", "0.2"], "interval: wanted LOW <= HIGH, got"),
    "infinite guidance": (["x", "--guidance", "inf"], "argument --guidance: wanted a finite number, got 'inf'"),
    "size": (["x", "--size", "64", "64", "30"], "argument --size: wanted a multiple of 4, got 30"),
    "no size": (["x", "--size", "64", "64", "0"], "argument --size: wanted an integer from 4 to"),
    "two sizes": (["x", "--size", "64", "64"], "argument --size: expected 3 arguments"),
    "spacing": (["x", "--spacing", "1", "1", "0"], "argument --spacing: wanted a length above 0 mm, got 0"),
    "NaN spacing": (["x", "--spacing", "1", "1", "nan"], "argument --spacing: wanted a finite number, got 'nan'"),
    "memory": (["x", "--memory", "plenty"], "memory_budget: wanted a positive size such as .*got 'plenty'"),
    "lone surrogate": (["a \udcff b"], "text: wanted characters, got the lone surrogate"),
    "dtype": (["x", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    "model files": (["x", "--model", "vea=a.pt"], "argument --model: wanted a folder or vae=FILE,.*got 'vea=a.pt'"),
    "same file twice": (["x", "--model", "vae=a,vae=b"], "argument --model: wanted a folder or .*got 'vae=b'"),
    "unknown model": (["x", "--model", "nowhere"], "model: wanted a folder, got 'nowhere'"),
    "unknown option": (["x", "--sead", "1"], "unrecognized arguments: --sead"),
}


@pytest.mark.parametrize("case", BAD_GENERATE)
def test_bad_input_is_one_line(pipeline, tmp_path, capsys, case):
    words, message = BAD_GENERATE[case]
    assert main(["generate", *words, "-o", str(tmp_path / "ct.nii.gz")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("t2ct: error: ") and printed.err.count("\n") == 1
    assert re.search(message, printed.err), printed.err
    assert not pipeline.calls and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("ct.mha", "wanted a name that ends in .nii.gz or .nii"),
        ("none/ct.nii.gz", "wanted an existing folder"),
        ("file/ct.nii.gz", "wanted an existing folder"),
        ("folder.nii", "wanted a file, got a folder"),
        ("x" * 300 + ".nii", "too long"),
    ],
)
def test_bad_output_is_found_before_loading(pipeline, tmp_path, capsys, output, message, monkeypatch):
    monkeypatch.setattr(FakePipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    (tmp_path / "file").touch()
    (tmp_path / "folder.nii").mkdir()
    assert main(["generate", "x", "-o", str(tmp_path / output)]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.nii"]


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt, 130), (RuntimeError, 2), (MemoryError, 2), (KeyError, None)]
)
def test_a_stop_while_sampling_leaves_no_file(pipeline, tmp_path, capsys, stop, code):
    def generate(text, **_):
        raise stop("wanted a miracle,\ngot none")

    pipeline.generate = generate
    words = ["generate", "x", "-o", str(tmp_path / "ct.nii.gz"), "--quiet"]
    if code is None:
        with pytest.raises(stop):
            main(words)
    else:
        assert main(words) == code
    if code == 2:
        lacking = "not enough memory: " if stop is MemoryError else ""
        assert capsys.readouterr().err == f"t2ct: error: {lacking}wanted a miracle, got none\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--debug", "generate"], ["generate", "--debug"]])
def test_debug_shows_the_traceback(pipeline, words, tmp_path):
    with pytest.raises(ValueError, match="wanted a prompt"):
        main([*words, "", "-o", str(tmp_path / "ct.nii")])


def test_warnings_are_one_line(pipeline, tmp_path, capsys):
    import warnings

    real = pipeline.generate

    def generate(text, **options):
        warnings.warn("the prompt was cut", stacklevel=2)
        return real(text, **options)

    pipeline.generate = generate
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["generate", "x", "-o", str(tmp_path / "ct.nii"), "--quiet"]) == 0
    assert capsys.readouterr().err == "t2ct: warning: the prompt was cut\n"


SMALL = ["--size", "32", "32", "16"]


def test_phantom_writes_its_folder(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    words = ["phantom", "--seed", "7", "-o", str(out), *SMALL, "--finding", "Pleural effusion:right:large"]
    assert main([*words, "--finding", "lung nodule:left:12mm"]) == 0
    names = {path.name for path in out.iterdir()}
    assert {"ct.nii.gz", "ct.json", "mask.nii.gz"} <= names and any(name.endswith(".png") for name in names)
    assert nib.load(out / "ct.nii.gz").shape == nib.load(out / "mask.nii.gz").shape == (32, 32, 16)
    report = json.loads((out / "report.json").read_text())
    drawn = {finding["name"]: finding for finding in report["findings"]}
    assert drawn["pleural effusion"]["side"] == "right" and drawn["pleural effusion"]["size"] == "large"
    assert drawn["lung nodule"]["side"] == "left" and drawn["lung nodule"]["size_mm"] == 12
    assert report["prompt"] in capsys.readouterr().out


def test_a_normal_phantom_has_no_findings(tmp_path):
    assert main(["phantom", "--seed", "7", "-o", str(tmp_path), *SMALL, "--normal"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["findings"] == []


def test_phantom_declares_every_file_it_writes(tmp_path):
    from t2ct.commands.phantom import FILES

    assert main(["phantom", "--seed", "7", "-o", str(tmp_path), *SMALL]) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["phantom", "--seed", "8", "-o", str(tmp_path), *SMALL]) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


BAD_PHANTOM = {
    "unknown finding": (
        ["--finding", "broken heart"],
        "wanted one of pleural effusion, .*got 'broken heart'",
    ),
    "unknown side": (
        ["--finding", "pleural effusion:top"],
        "wanted after pleural effusion: .*got 'top'",
    ),
    "two sides": (["--finding", "pleural effusion:left:right"], "argument --finding: wanted after .*got 'right'"),
    "no length": (["--finding", "lung nodule:manymm"], "argument --finding: wanted a finite number, got 'many'"),
    "normal with findings": (["--normal", "--finding", "emphysema"], "not allowed with argument"),
    "negative seed": (["--seed", "-7"], "argument --seed: wanted an integer from 0"),
    "size": (["--size", "30", "32", "32"], "argument --size: wanted a multiple of 4, got 30"),
    "tiny": (["--size", "4", "4", "4"], "size: wanted"),
    "huge": (["--size", "32768", "32768", "32768"], "size: wanted at most 1073741824 voxels"),
    "finer than there is memory for": (["--spacing", "0.1", "1", "1"], "spacing: wanted three numbers of mm from 0.3"),
    "nowhere": (["-o", ""], "output: wanted a folder, got ''"),
    "spacing of a sheet": (["--sheet", "a.png", "--spacing", "1", "1", "1"], "--spacing: wanted none beside --sheet"),
}


@pytest.mark.parametrize("case", BAD_PHANTOM)
def test_bad_phantom_is_one_line(tmp_path, capsys, case):

    words, message = BAD_PHANTOM[case]
    assert main(["phantom", "--seed", "7", "-o", str(tmp_path / "new"), *SMALL, *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("t2ct: error: ") and printed.err.count("\n") == 1
    assert re.search(message, printed.err), printed.err
    assert not list(tmp_path.iterdir())


def test_phantom_into_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"mine")
    for out in ("file", "file/new"):
        assert main(["phantom", "--seed", "7", "-o", str(tmp_path / out), *SMALL]) == 2
        assert "wanted a folder" in capsys.readouterr().err


def test_the_process_exits_with_the_code_and_one_line(tmp_path):
    done = run("generate", "x", "--steps", "0", "-o", str(tmp_path / "ct.nii"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("t2ct: error: argument --steps") and done.stderr.count("\n") == 1
    assert run().returncode == 2
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_the_process(tmp_path):
    """A real SIGINT while the model samples: exit code 130, no traceback, no file."""
    code = f"""
import os, signal, sys, types
sys.path[:0] = {sys.path!r}
module = types.ModuleType("t2ct.pipeline")
class T2CTPipeline:
    size, spacing = (16, 16, 8), (20.0, 20.0, 40.0)
    @classmethod
    def from_pretrained(cls, *_, **__):
        return cls()
def generate(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    import time
    time.sleep(30)
module.generate, module.T2CTPipeline = generate, T2CTPipeline
sys.modules["t2ct.pipeline"] = module
from t2ct.cli import main
sys.exit(main(["generate", "x", "--quiet", "-o", {str(tmp_path / "ct.nii.gz")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (130, "t2ct: interrupted")
    assert not list(tmp_path.iterdir())
