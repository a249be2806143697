"""Loading, generating, saving: on small random networks in the published layout, and on the embedded model."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import t2ct
from t2ct.checks import EMBEDDED
from t2ct.config import PipelineConfig
from t2ct.models import CLIP3D, VAE, CLIP3DConfig, TextConfig, UNet, UNetConfig, VAEConfig, VisionConfig
from t2ct.pipeline import T2CTPipeline
from t2ct.text import Tokenizer

TEXT = "Large right pleural effusion with adjacent atelectasis."
SMALL = PipelineConfig(
    name="small",
    size=(16, 16, 16),
    spacing=(20.0, 20.0, 20.0),
    vae=VAEConfig(channels=(8, 8, 16), norm_groups=4, num_res_blocks=1),
    unet=UNetConfig(
        channels=(8, 16),
        attention_levels=(False, True),
        head_dim=8,
        cross_attention_dim=24,
        norm_groups=4,
        num_res_blocks=1,
    ),
    clip=CLIP3DConfig(
        text=TextConfig(vocab_size=280, width=16, layers=1, heads=2, mlp_width=32, max_length=24),
        vision=VisionConfig(
            dim=16,
            image_size=16,
            patch_size=8,
            temporal_patch_size=4,
            spatial_layers=1,
            temporal_layers=1,
            heads=2,
            head_dim=8,
            codebook_size=8,
            depth=16,
        ),
        embed_dim=24,
    ),
)


def randomised(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Files as they were published: three .pt, the UNet's wrapped with its scale factor, and a tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    states = {
        "vae": randomised(VAE(SMALL.vae), 1).state_dict(),
        "unet": {
            "unet_state_dict": randomised(UNet(SMALL.unet), 2).state_dict(),
            "scale_factor": torch.tensor(1.25),
            "epoch": 200,
        },
        "clip": randomised(CLIP3D(SMALL.clip), 3).state_dict(),
    }
    files = {name: folder / f"{name}.pt" for name in states}
    for name, state in states.items():
        torch.save(state, files[name])
    files["tokenizer"] = folder / "tokenizer.json"
    words = [
        f"{a} {b} pleural effusion nodule in the {c} lobe of lung"
        for a in ("large", "small")
        for b in ("left", "right")
        for c in ("upper", "lower")
    ]
    Tokenizer.train(words * 9, SMALL.clip.text.vocab_size, files["tokenizer"])
    files["config"] = folder / "config.json"
    files["config"].write_text(SMALL.to_json())
    return files


@pytest.fixture(scope="module")
def pipe(published):
    return T2CTPipeline.from_pretrained(published, device="cpu")


def test_published_files_load_only_what_generation_needs(published, pipe):
    assert pipe.config.scale_factor == 1.25  # the checkpoint's own, not the configuration's 1.0287
    names = set(pipe.clip.state_dict())
    assert names
    assert not any("vision" in n or "visual" in n for n in names)
    for network, reference in (
        (pipe.vae, torch.load(published["vae"])),
        (pipe.unet, torch.load(published["unet"])["unet_state_dict"]),
    ):
        assert all(torch.equal(v, reference[k]) for k, v in network.state_dict().items())


def test_a_volume(pipe):
    volume = pipe(TEXT, generator=3, num_inference_steps=2, progress=False)
    assert isinstance(volume, t2ct.Volume)
    hu = np.asarray(volume)
    assert hu.dtype == np.int16
    assert hu.shape == (16, 16, 16)
    assert -1000 <= hu.min() <= hu.max() <= 1000
    assert volume.spacing == (20, 20, 20)
    assert volume.seed == 3
    assert volume.prompt == TEXT
    facts = volume.provenance
    assert facts["steps"] == 2
    assert facts["guidance"] == 5.0
    assert facts["weights"] == pipe.weights_hash
    assert facts["version"] == t2ct.__version__


def test_same_seed_same_bits_and_zero_is_a_seed(pipe):
    run = lambda seed: pipe(TEXT, generator=seed, num_inference_steps=2, progress=False)  # noqa: E731
    assert np.array_equal(run(0).hu, run(0).hu)
    assert run(0).seed == 0
    assert not np.array_equal(run(0).hu, run(1).hu)
    drawn = run(None)
    assert np.array_equal(drawn.hu, run(drawn.seed).hu)
    assert np.array_equal(run(torch.Generator().manual_seed(7)).hu, run(7).hu)


def test_text_negative_prompt_and_guidance_matter(pipe):
    go = lambda text=TEXT, **k: pipe(text, generator=1, num_inference_steps=2, output_type="np", progress=False, **k)  # noqa: E731
    base = go()
    assert base.shape == (1, 16, 16, 16)
    assert base.dtype == np.float32
    for other in (
        go("small left nodule"),
        go(negative_prompt="nodule"),
        go(guidance_scale=1.0),
        go(spacing=(10, 10, 10)),
    ):
        assert not np.array_equal(base, other)


def test_a_batch_is_its_prompts_one_by_one(pipe):
    noise = torch.randn(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    texts = [TEXT, "small left nodule"]
    both = pipe(texts, latents=noise, num_inference_steps=2, progress=False)
    assert [v.prompt for v in both] == texts
    for i, text in enumerate(texts):
        alone = pipe(text, latents=noise[i : i + 1], num_inference_steps=2, progress=False)
        assert (
            np.abs(alone.hu.astype(int) - both[i].hu).max() <= 1
        )  # one rounding: batched GEMMs add up in another order


def test_prompt_embeds_latents_and_callback(pipe):
    embeds, seen = pipe.embed([TEXT]), []

    def stop_motion(p, step, timestep, tensors):
        seen.append((p is pipe, step, tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else None

    z = pipe(
        prompt_embeds=embeds,
        generator=5,
        num_inference_steps=3,
        output_type="latent",
        callback_on_step_end=stop_motion,
        progress=False,
    )
    assert seen == [(True, i, (1, 4, 4, 4, 4)) for i in range(3)]
    assert torch.equal(z, torch.zeros_like(z))
    a = pipe(prompt_embeds=embeds, generator=5, num_inference_steps=2, progress=False)
    b = pipe(TEXT, generator=5, num_inference_steps=2, progress=False)
    assert np.array_equal(a[0].hu, b.hu)
    assert torch.equal(
        torch.from_numpy(b.hu).float(),
        pipe(TEXT, generator=5, num_inference_steps=2, output_type="pt", progress=False)[0].round(),
    )


def test_save_pretrained_round_trips_bit_for_bit(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    again = T2CTPipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert again.config == pipe.config
    assert again.weights_hash == pipe.weights_hash
    for name in ("vae", "unet", "clip"):
        ours, theirs = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert np.array_equal(
        pipe(TEXT, generator=1, num_inference_steps=1, progress=False).hu,
        again(TEXT, generator=1, num_inference_steps=1, progress=False).hu,
    )
    pipe.save_pretrained(tmp_path / "model")  # over files that the second pipeline may still map


def test_report_parts_are_formed_as_trained(pipe):
    volume = pipe(
        {"findings": "Small nodule.", "impression": "Nodule."}, generator=0, num_inference_steps=1, progress=False
    )
    assert volume.prompt == "Findings: Small nodule. Impression: Nodule."


def test_a_long_report_is_cut_with_one_warning(pipe):
    with pytest.warns(UserWarning, match="longer than 24 tokens; cut") as caught:
        pipe("large nodule " * 60, generator=0, num_inference_steps=1, progress=False)
    assert len(caught) == 1


def test_low_precision(published):
    for dtype in (torch.bfloat16, torch.float16):
        pipe = T2CTPipeline.from_pretrained(published, device="cpu", dtype=dtype)
        assert pipe(TEXT, generator=0, num_inference_steps=2, progress=False).provenance["dtype"] in str(dtype)


def test_generate_with_files_and_defaults(published):
    files = {k: str(v) for k, v in published.items()}
    volume = t2ct.generate(TEXT, model=files, seed=4, num_inference_steps=1, device="cpu", progress=False)
    again = t2ct.generate(
        TEXT,
        model=files,
        seed=4,
        num_inference_steps=1,
        device="cpu",
        progress=False,
        size=(16, 16, 8 * 4),
        spacing=(20, 20, 10),
    )
    assert volume.shape == (16, 16, 16)
    assert again.shape == (16, 16, 32)


BAD = [
    (dict(text=""), ValueError, "prompt|text"),
    (dict(text=5), TypeError, "int"),
    (dict(num_inference_steps=0), ValueError, "num_inference_steps must be an integer from 1 to 1000, got 0"),
    (dict(seed=-1), ValueError, "seed must be an integer from 0 .*, got -1"),
    (dict(guidance_scale=float("nan")), ValueError, "guidance_scale must be a finite number, got nan"),
    (dict(size=(16, 16, 15)), ValueError, "size must be three positive multiples of 4 .*15"),
    (dict(size=(16, 16, 12)), ValueError, "size must be three positive multiples of 8 .*12"),
    (dict(size=(16, 16)), ValueError, "size must be three positive multiples"),
    (dict(spacing=(1, 0, 1)), ValueError, "spacing must be three positive numbers"),
    (dict(device="cuda:7"), ValueError, "device: wanted one that is there, got 'cuda:7'"),
    (dict(device="gpu"), ValueError, "device: wanted one that is there, got 'gpu'"),
    (dict(dtype=torch.float64), ValueError, "dtype must be float32, bfloat16 or float16, got torch.float64"),
    (dict(model="no/such/folder"), FileNotFoundError, "model: wanted a folder .* got 'no/such/folder'"),
    (dict(model={"vae": "a.pt"}), ValueError, "model: wanted files for vae, unet, clip, tokenizer .*got vae"),
]


@pytest.mark.parametrize("wrong,kind,message", BAD, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_bad_arguments(published, wrong, kind, message):
    arguments = {
        "text": TEXT,
        "model": published,
        "device": "cpu",
        "progress": False,
        "num_inference_steps": 1,
        **wrong,
    }
    with pytest.raises(kind, match=message):
        t2ct.generate(arguments.pop("text"), **arguments)


@pytest.mark.parametrize(
    "wrong,kind,message",
    [
        (dict(prompt=None), ValueError, "either prompt or prompt_embeds, got neither"),
        (dict(prompt_embeds=torch.zeros(1, 1, 24)), ValueError, "either prompt or prompt_embeds, got both"),
        (
            dict(prompt=None, prompt_embeds=torch.zeros(1, 24)),
            ValueError,
            r"prompt_embeds must be \(B, L, 24\), got \(1, 24\)",
        ),
        (dict(prompt=[]), ValueError, "at least one text, got an empty list"),
        (
            dict(latents=torch.zeros(1, 4, 4, 4, 2)),
            ValueError,
            r"latents must be finite, \(1, 4, 4, 4, 4\), got \(1, 4, 4, 4, 2\)",
        ),
        (dict(output_type="pil"), ValueError, "output_type must be one of .* got 'pil'"),
    ],
)
def test_bad_calls(pipe, wrong, kind, message):
    with pytest.raises(kind, match=message):
        pipe(**{"prompt": TEXT, "progress": False, **wrong})


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil-ran",))


def damage(kind, published, folder):
    path = folder / "vae.pt"
    state = torch.load(published["vae"])
    first = sorted(state)[:4]
    if kind == "truncated":
        path.write_bytes(published["vae"].read_bytes()[:2000])
    elif kind == "missing keys":
        torch.save({k: v for k, v in state.items() if k not in first}, path)
    elif kind == "shapes":
        torch.save({k: v[..., :1] if k in first else v for k, v in state.items()}, path)
    elif kind == "code":
        path.write_bytes(pickle.dumps({"weight": Evil()}))
    elif kind == "zipped code":
        torch.save({"weight": Evil()}, path)
    elif kind == "not a dict":
        torch.save([torch.ones(1)], path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "safetensors":
        path = path.with_suffix(".safetensors")
        path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    return {**published, "vae": path}


@pytest.mark.parametrize(
    "kind,message",
    [
        ("truncated", "wanted a whole torch file, got"),
        ("missing keys", "lacks 4 of .* tensors, first decoder.*, .*, "),
        ("shapes", "of another shape: .* wanted .*, got"),
        ("code", "refused|wanted a whole torch file"),
        ("zipped code", "asks to run code; refused"),
        ("not a dict", "wanted a state dict of tensors, got list"),
        ("empty", "wanted a whole torch file"),
        ("safetensors", "wanted a whole safetensors file"),
    ],
)
def test_bad_weights(kind, message, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        T2CTPipeline.from_pretrained(damage(kind, published, tmp_path), device="cpu")
    assert "\n" not in str(caught.value)
    assert not Path("evil-ran").exists()


def test_bad_config(published, tmp_path):
    for change, message in (
        ({"format": "other"}, "wanted format"),
        ({"sizes": 3}, "no field 'sizes'"),
        ({"schedule": "x"}, "schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            T2CTPipeline.from_pretrained(
                {**published, "config": {**json.loads(SMALL.to_json()), **change}}, device="cpu"
            )
    assert PipelineConfig.from_json(json.loads(SMALL.to_json())) == SMALL
    assert PipelineConfig.from_json(asdict(replace(SMALL, name="other"))).name == "other"


MEASURE = """
import sys, threading, time
from t2ct.pipeline import T2CTPipeline
import torch
def resident():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["VmRSS"].split()[0]) * 1024
files = dict(zip(("vae", "unet", "clip", "tokenizer", "config"), sys.argv[2:]))
T2CTPipeline.from_pretrained(files, device="cpu")  # imports and first use paid for; freed at once
import gc; gc.collect()
before, peak, go = resident(), 0, True
def watch():
    global peak
    while go:
        peak = max(peak, resident())
        time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
pipe = T2CTPipeline.from_pretrained(files, device="cpu", dtype=getattr(torch, sys.argv[1]))
time.sleep(0.05); go = False; thread.join()
kept = sum(t.nbytes for n in (pipe.vae, pipe.unet, pipe.clip) for t in n.state_dict().values())
print(kept, max(peak, resident()) - before)
"""


def peak_over_kept(config, folder, dtype, tokenizer, seed=None):
    """(bytes kept, growth of resident memory while loading) in a process of its own, files of `config` as published."""
    files = {name: folder / f"{name}.pt" for name in ("vae", "unet", "clip")}
    for name, model in (("vae", VAE(config.vae)), ("unet", UNet(config.unet)), ("clip", CLIP3D(config.clip))):
        torch.save(model.state_dict(), files[name])
    (folder / "config.json").write_text(config.to_json())
    arguments = [dtype, *map(str, files.values()), str(tokenizer), str(folder / "config.json")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, grown = map(int, done.stdout.split())
    return kept, grown


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_little_more_than_what_is_kept(dtype, published, tmp_path):
    """Peak <= 1.15 x kept: the vision tower and its projection (ten times the text tower here) are never read."""
    config = replace(
        SMALL,
        unet=replace(SMALL.unet, channels=(128, 512), num_res_blocks=2, head_dim=32),
        vae=replace(SMALL.vae, channels=(64, 128, 256), norm_groups=32),
        clip=replace(SMALL.clip, vision=replace(SMALL.clip.vision, dim=1024, heads=16, head_dim=64)),
    )
    kept, grown = peak_over_kept(config, tmp_path, dtype, published["tokenizer"])
    assert kept > (1 << 28 if dtype == "float32" else 1 << 27)
    assert grown <= 1.15 * kept + (8 << 20)  # and the allocator's own few megabytes


@pytest.mark.slow
def test_loading_the_published_sizes(published, tmp_path):
    config = replace(PipelineConfig(), clip=replace(PipelineConfig().clip, text=replace(TextConfig(), vocab_size=280)))
    kept, grown = peak_over_kept(config, tmp_path, "float32", published["tokenizer"])
    print(f"kept {kept / 1e9:.3f} GB, grew by {grown / 1e9:.3f} GB")
    assert grown <= 1.15 * kept


needs_embedded = pytest.mark.skipif(
    not (EMBEDDED / "unet.safetensors").exists(), reason="the package holds no embedded model"
)


@needs_embedded
def test_the_embedded_model_is_small():
    assert sum(p.stat().st_size for p in EMBEDDED.iterdir()) <= 24e6


@needs_embedded
def test_the_embedded_model_makes_a_chest():
    """Air around a body, aerated lungs in it, bone, and the same bits twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        volume = t2ct.generate("Normal chest CT.", seed=0, device="cpu", progress=False)
    hu = volume.hu
    assert min(volume.shape[:2]) >= 64
    assert volume.shape[2] >= 32
    corners = hu[[0, 0, -1, -1], [-1, -3, -1, -3]]  # in front of the patient, at both sides
    assert np.median(corners) < -900
    middle = hu[:, :, hu.shape[2] // 2]
    assert 0.2 < (middle > -300).mean() < 0.8
    assert 0.05 < (hu < -600)[16:48, 16:48, 8:24].mean() < 0.8
    assert (hu > 200).mean() > 0.001
    assert np.array_equal(hu, t2ct.generate("Normal chest CT.", seed=0, device="cpu", progress=False).hu)


@needs_embedded
def test_effusion_lies_on_the_side_that_was_asked_for():
    """Denser right base with a right effusion, denser left base with a left one, on most of a few seeds."""
    pipe = T2CTPipeline.from_pretrained(device="cpu")
    differences = []
    for side in ("right", "left"):
        hu = pipe([f"Large {side} pleural effusion."] * 4, generator=1, output_type="np", progress=False)
        back = hu[:, :, 14:30, 8:18]  # posterior, lower half of the chest
        right, left = back[:, 34:54].mean((1, 2, 3)), back[:, 10:30].mean((1, 2, 3))
        differences.append((right - left) if side == "right" else (left - right))
    assert (np.concatenate(differences) > 0).mean() >= 0.75
