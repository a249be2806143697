"""Two processes compute what one computes: gradients within 1e-5, for every recipe. Run by torchrun, over gloo."""

import faulthandler
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import SMALL

from t2ct.train import train
from t2ct.train.config import to_toml
from t2ct.train.presets import preset

KINDS = {
    "vae": {"patches": [[16, 16, 16]], "patch_from": [0.0], "critic_from": 0.0, "critic_channels": 4,
            "critic_layers": 1, "learning_rate": 1e-4},
    "clip": {"learning_rate": 1e-4, "tokenizer": "tokenizer.json", "label_weight": 1.0},
    "ldm": {"learning_rate": 1e-4, "latents": "sampled", "preview_steps": 1},
}  # fmt: skip
SHARED = KINDS["ldm"] | {"shard": "optimiser", "matrix_learning_rate": 1e-3}
COMMON = {"steps": 2, "batch": 4, "micro": 1, "precision": "float32", "ema": 0.5, "schedule": "constant", "warmup": 0}


def train_all(root: Path) -> None:
    for kind, values in KINDS.items():
        train_one(root, kind, values)
    train_one(root, "clip-text", KINDS["clip"] | {"contrast_weight": 0.0})
    train_one(root, "ldm-shared", SHARED)


def train_one(root: Path, name: str, values: dict) -> None:
    values, kind = dict(values), name.partition("-")[0]
    if kind == "clip":
        values["tokenizer"] = str(root.parent / "tokenizer.json")
    if kind == "ldm":  # the same VAE and text tower for both
        values |= {"vae": str(root.parent / "model"), "clip": str(root.parent / "model")}
    data = str(root / "ldm/latents") if name.startswith("ldm-") else "phantoms:8"
    train(kind, data, root / name, preset="published", config=root.parent / f"{kind}.toml", quiet=True,
          device="cpu", resume=True, **(COMMON | values))  # fmt: skip


@pytest.fixture(scope="module")
def runs(published, tmp_path_factory):
    """The folders of one process and of two."""
    from t2ct.pipeline import T2CTPipeline

    folder = tmp_path_factory.mktemp("ranks")
    T2CTPipeline.from_pretrained(published, "cpu", torch.float32).save_pretrained(folder / "model")
    (folder / "tokenizer.json").write_bytes((folder / "model" / "tokenizer.json").read_bytes())
    from dataclasses import replace

    for kind in KINDS:
        (folder / f"{kind}.toml").write_text(to_toml(replace(preset(kind, "published"), model=SMALL, seed=3)))
    torch.set_num_threads(1)
    train_all(folder / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*launch, str(folder / "two")], capture_output=True, text=True, timeout=300,
                          env={**__import__("os").environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("name", (*KINDS, "clip-text"))
def test_two_processes_are_one(runs, name):
    kind = name.partition("-")[0]
    one, two = (load_file(runs / n / name / "checkpoints/step-00000002.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    moments = [k for k in one if k.endswith("exp_avg")]  # linear in the gradients
    assert len(moments) > 20
    parts = {k.split(".")[1] for k in moments}
    assert parts == ({"vae", "critic"} if kind == "vae" else {"unet"} if kind == "ldm" else {"clip"})
    for part in parts:
        own = [k for k in moments if k.split(".")[1] == part]
        largest = max(one[k].abs().max() for k in own)
        assert largest > 0
        for key in own:
            assert (one[key] - two[key]).abs().max() <= 1e-5 * largest, key
    for key in one:  # Adam turns the rounding of a gradient that is nothing into a step: at most two of them
        if key.startswith(("part.", "ema.")) and one[key].is_floating_point() and "cluster_size" not in key:
            assert torch.allclose(one[key].float(), two[key].float(), atol=4.1e-4), key
    if kind == "clip":
        for name in ("embed", "cluster_size"):
            key = f"part.clip.model.vision_model.vq._codebook.{name}"
            assert torch.allclose(one[key], two[key], atol=1e-4), name


def test_a_shared_optimiser_makes_the_same_steps(runs):
    """Of two ranks each steps its share; the checkpoint holds all of it, and one process takes it up."""
    one, two = (load_file(runs / n / "ldm-shared/checkpoints/step-00000002.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    kinds = {k.rpartition(".")[2] for k in two if k.startswith("optim.")}
    assert kinds == {"exp_avg", "exp_avg_sq", "step", "momentum_buffer"}
    for key in one:
        if key.endswith((".exp_avg", ".momentum_buffer")):
            assert torch.allclose(one[key], two[key], atol=1e-5 * max(1e-3, one[key].abs().max())), key
    same_weights(one, two)
    more = []
    for folder in ("one", "two"):
        shutil.copytree(runs / folder / "ldm-shared", runs / folder / "ldm-more")
        for name in ("run.json", "config.toml"):
            file = runs / folder / "ldm-more" / name
            text = file.read_text().replace('"steps": 2', '"steps": 3').replace("steps = 2\n", "steps = 3\n")
            file.write_text(text)
        train_one(runs / folder, "ldm-more", SHARED | {"steps": 3})
        more.append(load_file(runs / folder / "ldm-more/checkpoints/step-00000003.safetensors"))
    steps = [v.item() for k, v in more[1].items() if k.startswith("optim.") and k.endswith(".step")]
    assert len(steps) > 50 and set(steps) == {3.0}
    same_weights(*more, share=0.05)  # moments that were lost show in the steps above, of which there would be 1
    assert any(not torch.equal(more[1][k], two[k]) for k in two if k.startswith("part."))


def same_weights(one, two, share=1e-3):
    """But for what Adam makes of gradients that are rounding alone: a few numbers, and more with every step."""
    far = total = 0
    for key in one:
        if key.startswith(("part.", "ema.")):
            far += ((one[key].float() - two[key].float()).abs() > 2e-6).sum().item()
            total += one[key].numel()
    assert far <= share * total, (far, total)


def test_latents_are_shared_out_and_the_same(runs):
    one, two = (load_file(runs / n / "ldm/latents/train/latents-00000.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(120, exit=True)  # who waits for whom
    torch.set_num_threads(1)
    train_all(Path(sys.argv[1]))
