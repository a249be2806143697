"""Loading, generating, saving: on small random networks in the published layout, and on the embedded model."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import t2ct
from t2ct.checks import EMBEDDED, find_files
from t2ct.cli import main
from t2ct.pipeline import T2CTPipeline

TEXT = "Large right pleural effusion with adjacent atelectasis."


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
    assert facts["guidance"] == 5.0 and facts["guidance_interval"] == [0.0, 1.0]
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
        go(guidance_interval=(0.0, 0.5)),
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


def test_a_model_is_a_folder_a_run_or_the_name_of_the_one_in_the_package(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "run" / "final")
    loaded = T2CTPipeline.from_pretrained(tmp_path / "run")  # as `t2ct train` leaves it
    assert loaded.weights_hash == T2CTPipeline.from_pretrained(tmp_path / "run" / "final").weights_hash
    assert find_files("embedded") == find_files(None) == find_files(EMBEDDED)
    assert main(["info", "embedded"]) == 0 and main(["info"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "embedded" in told[0] and told[: len(told) // 2] == told[len(told) // 2 :]
    with pytest.raises(FileNotFoundError, match="wanted a folder with config.json.*got 'nowhere'"):
        find_files("nowhere")


def test_a_model_that_changed_is_read_anew(pipe, tmp_path, monkeypatch):
    """`generate` keeps the last model, for as long as its files are what they were."""
    options = {"seed": 1, "num_inference_steps": 1, "progress": False, "device": "cpu"}
    for name in ("a", "b"):
        pipe.save_pretrained(tmp_path / name / "model")
    file = tmp_path / "b" / "model" / "unet.safetensors"
    save_file({k: 1.5 * v for k, v in load_file(file).items()}, file)
    hashes = []
    for name in ("a", "b"):  # the same words, another folder
        monkeypatch.chdir(tmp_path / name)
        hashes.append(t2ct.generate(TEXT, model="model", **options).provenance["weights"])
    pipe.save_pretrained("model")  # the same folder, other weights
    hashes.append(t2ct.generate(TEXT, model="model", **options).provenance["weights"])
    assert hashes[0] == hashes[2] != hashes[1]


def test_report_parts_are_formed_as_trained(pipe):
    volume = pipe(
        {"findings": "Small nodule.", "impression": "Nodule."}, generator=0, num_inference_steps=1, progress=False
    )
    assert volume.prompt == "Findings: Small nodule. Impression: Nodule."


def test_a_long_report_is_cut_with_one_warning(pipe):
    with pytest.warns(UserWarning, match="longer than 48 tokens; cut") as caught:
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


def test_numbers_of_numpy_are_numbers(published, pipe):
    given = dict(num_inference_steps=2, seed=3, size=(16, 16, 32), spacing=(20.0, 20.0, 10.0), guidance_scale=2.0)
    arrays = dict(num_inference_steps=np.int64(2), seed=np.int64(3), size=np.array((16, 16, 32)),
                  spacing=np.array((20, 20, 10), np.float32), guidance_scale=np.float32(2),
                  memory_budget=np.int64(10**9))  # fmt: skip
    one, other = (t2ct.generate(TEXT, model=pipe, progress=False, **numbers) for numbers in (given, arrays))
    assert np.array_equal(one.hu, other.hu) and one.provenance == other.provenance and one.seed == other.seed
    assert json.dumps(other.provenance)


def test_a_loaded_pipeline_stays_where_it_is(pipe):
    options = dict(model=pipe, seed=1, num_inference_steps=1, progress=False, size=(16, 16, 16))
    t2ct.generate(TEXT, device=pipe.device, dtype=pipe.dtype, **options)
    with pytest.raises(ValueError, match="dtype: wanted that of the loaded pipeline, torch.float32, or None, got"):
        t2ct.generate(TEXT, dtype=torch.bfloat16, **options)
    pipe = copy.copy(pipe)
    pipe.device = torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device: wanted that of the loaded pipeline, cuda:1, or None, got 'cpu'"):
        t2ct.generate(TEXT, device="cpu", **options | {"model": pipe})


BAD = [
    (dict(text=""), ValueError, "prompt|text"),
    (dict(text=5), TypeError, "int"),
    (dict(num_inference_steps=0), ValueError, "num_inference_steps must be an integer from 1 to 1000, got 0"),
    (dict(seed=-1), ValueError, "seed must be an integer from 0 .*, got -1"),
    (dict(guidance_interval=(0.6, 0.2)), ValueError, r"guidance_interval must be two rising times .* got \(0.6, 0.2\)"),
    (dict(guidance_scale=float("nan")), ValueError, "guidance_scale must be a finite number, got nan"),
    (dict(size=(16, 16, 15)), ValueError, "size must be three positive multiples of 4 .*15"),
    (dict(size=(16, 16, 12)), ValueError, "size must be three positive multiples of 8 .*12"),
    (dict(size=(16, 16)), ValueError, "size must be three positive multiples"),
    (dict(size=np.array([[16, 16, 16]])), ValueError, "size must be three positive multiples"),
    (dict(size=(16.0, 16, 16)), ValueError, "size must be three positive multiples"),
    (dict(spacing=(1, 1, 1e300)), ValueError, "spacing must be three positive numbers"),
    (dict(spacing=(1, 1, 10**400)), ValueError, "spacing must be three positive numbers"),
    (dict(text="\ud800"), ValueError, "text: wanted characters, got the lone surrogate"),
    (dict(memory_budget=10**400), ValueError, "memory_budget: wanted a positive size"),
    (dict(spacing=(1, 0, 1)), ValueError, "spacing must be three positive numbers"),
    (dict(device="cuda:7"), ValueError, "device: wanted one that is there, got 'cuda:7'"),
    (dict(device=3.5), ValueError, "device: wanted one that is there, got '3.5'"),
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
        (dict(prompt=5), TypeError, "prompt: wanted a text, a report, or a list of them, got int"),
        (dict(latents=np.zeros((1, 4, 4, 4, 4))), TypeError, "latents: wanted a tensor, got ndarray"),
        (dict(prompt=None, prompt_embeds=np.zeros((1, 1, 24))), TypeError, "prompt_embeds: wanted a tensor, got nd"),
        (dict(prompt=None, prompt_embeds=torch.full((1, 1, 24), torch.nan)), ValueError, "prompt_embeds must be fin"),
        (dict(callback_on_step_end=lambda *_: 5), TypeError, "callback_on_step_end: wanted it to return a dict or"),
        (
            dict(callback_on_step_end=lambda *_: {"latents": torch.zeros(2)}),
            ValueError,
            r"callback_on_step_end: wanted latents \(1, 4, 4, 4, 4\), got \(2,\)",
        ),
        (dict(output_type="pil"), ValueError, "output_type must be one of .* got 'pil'"),
    ],
)
def test_bad_calls(pipe, wrong, kind, message):
    with pytest.raises(kind, match=message):
        pipe(**{"prompt": TEXT, "progress": False, **wrong})
