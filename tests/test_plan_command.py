"""`t2ct plan`, and the memory options of `t2ct generate`."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import t2ct
from t2ct.cli import main
from t2ct.commands import arguments


def test_plan_is_printed_and_drawn(tmp_path, capsys):
    picture = tmp_path / "plan.png"
    words = ["plan", "decode", "--size", "512x512x128", "--memory", "8GB", "--device", "cuda", "--plot", str(picture)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "decode 512 x 512 x 128 voxels in float16 on cuda" in out and "recomputes nothing" in out
    assert "decoder.blocks.8.conv2" in out and f"wrote {picture}" in out
    with Image.open(picture) as image:
        assert image.size == (1120, 560) and len(image.getcolors(maxcolors=10**6)) > 8
    assert main(words) == 2  # the picture is there already
    assert "exists" in capsys.readouterr().err


def test_plan_of_a_model_folder_and_of_encoding(capsys):
    cpu = ["--device", "cpu", "--dtype", "bfloat16"]
    assert main(["plan", "encode", "--size", "128x128x64", "--memory", "1GB", *cpu]) == 0
    assert "encoder.blocks.10" in capsys.readouterr().out
    folder = Path(t2ct.__file__).parent / "assets/embedded"
    for model in (folder, folder / "config.json", "embedded"):
        assert main(["plan", "decode", "--size", "96x96x48", "--model", str(model), *cpu]) == 0
        assert "16x96x96x48" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "512x512"], "wanted voxels such as 512x512x128"),
        (["--size", "510x512x128"], "wanted a multiple of 4, got 510"),
        (["--size", "64x64x64", "--memory", "6 apples"], 'memory_budget: wanted a positive size such as "6GB"'),
        (["--size", "512x512x512", "--memory", "1MB"], "memory_budget: wanted at least"),
        (["--size", "64x64x64", "--spool", "/nowhere/at/all"], "spool_dir: wanted a folder"),
        (["--size", "64x64x64", "--model", "/nowhere/at/all"], "--model: wanted a folder with config.json"),
        (["--size", "64x64x64", "--plot", "plan.pdf"], "wanted a file that ends in .png"),
    ],
)
def test_bad_plans_are_told_in_one_line(words, message, capsys):
    assert main(["plan", "decode", "--device", "cpu", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_size_words():
    assert arguments.size("512X256x128") == (512, 256, 128)


def test_generate_within_a_budget_has_the_same_bits_and_refuses_before_sampling(tmp_path, capsys):
    options = {"num_inference_steps": 1, "seed": 3, "size": (32, 32, 16), "progress": False}
    free = t2ct.generate("Normal chest.", **options)
    assert (t2ct.generate("Normal chest.", memory_budget="50MB", spool_dir=tmp_path, **options).hu == free.hu).all()
    with pytest.raises(ValueError, match="memory_budget: wanted at least"):
        t2ct.generate("Normal chest.", memory_budget="1kB", **options)
    with pytest.raises(ValueError, match="memory_budget: wanted a positive size"):
        t2ct.generate("Normal chest.", memory_budget="much", **options)
    out = tmp_path / "ct.nii.gz"
    words = ["generate", "Normal chest.", "-o", str(out), "--steps", "1", "--size", "32", "32", "16", "--seed", "3"]
    assert main([*words, "--memory", "10kB"]) == 2 and not out.exists()
    assert "wanted at least" in capsys.readouterr().err
    assert main([*words, "--memory", "60MB", "--spool", str(tmp_path)]) == 0
    assert out.exists() and torch.is_tensor(torch.from_numpy(free.hu))
