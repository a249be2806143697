"""The recipes by name: `published`, `recommended` as is known to be better, `embedded` and `tiny` for a CPU."""

from __future__ import annotations

from dataclasses import replace

from t2ct.config import PipelineConfig
from t2ct.data.phantoms.reports.details import DETAILS
from t2ct.models import CLIP3DConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from t2ct.models.judge import JudgeConfig
from t2ct.train.config import CLIPTraining, JudgeTraining, LDMTraining, Training, VAETraining

EMBEDDED = PipelineConfig(
    name="embedded",
    size=(96, 96, 48),
    spacing=(352 / 96, 352 / 96, 320 / 48),
    schedule="exact",
    base_voxels=24 * 24 * 12 // 16,  # the shift that the published model has at its size: 16^(1/3) = 2.52
    vae=VAEConfig(channels=(16, 32, 96), norm_groups=4, num_res_blocks=1),
    unet=UNetConfig(
        channels=(64, 80, 96),
        attention_levels=(False, True, True),
        head_dim=16,
        cross_attention_dim=256,
        norm_groups=8,
        num_res_blocks=1,
        num_class_embeds=2,
    ),
    clip=CLIP3DConfig(
        text=TextConfig(vocab_size=1024, width=160, layers=4, heads=5, mlp_width=640, max_length=192),
        vision=VisionConfig(
            dim=96,
            image_size=96,
            patch_size=12,
            temporal_patch_size=12,
            spatial_layers=2,
            temporal_layers=2,
            heads=4,
            head_dim=24,
            codebook_size=512,
            depth=48,
        ),
        embed_dim=256,
    ),
)

TINY = PipelineConfig(
    name="tiny",
    size=(32, 32, 32),
    spacing=(11.0, 11.0, 10.0),
    schedule="exact",
    base_voxels=8 * 8 * 8 // 16,
    vae=VAEConfig(channels=(8, 16, 32), norm_groups=4, num_res_blocks=1),
    unet=UNetConfig(
        channels=(32, 48),
        attention_levels=(False, True),
        head_dim=16,
        cross_attention_dim=64,
        norm_groups=8,
        num_res_blocks=1,
        num_class_embeds=2,
    ),
    clip=CLIP3DConfig(
        text=TextConfig(vocab_size=512, width=64, layers=2, heads=2, mlp_width=128, max_length=192),
        vision=VisionConfig(
            dim=48,
            image_size=32,
            patch_size=8,
            temporal_patch_size=8,
            spatial_layers=1,
            temporal_layers=1,
            heads=2,
            head_dim=24,
            codebook_size=64,
            depth=32,
        ),
        embed_dim=64,
    ),
)

# The stage that a network's own begins from, where a preset has it.
FIRST = {"vae": "vae-slab", "clip": "clip-text"}
# What `--data` is when nothing is said.
DEFAULT_DATA = {"tiny": "phantoms:64", "embedded": "phantoms:6000"}
JUDGE_DATA = {"tiny": "phantoms:120", "embedded": "phantoms:5000"}
OWN_TERMS = {  # of a VAE too small, and trained too briefly, for a critic
    "augment": False,
    "perceptual": "none",
    "adversarial_weight": 0.0,
    "kl_weight": 1.5e-3,  # at ten times this half the channels of a VAE this small collapse
    "kl_per_voxel": True,
    "edge_weight": 1.0,
    "square_weight": 5.0,
    "window_weight": 0.05,  # fluid and muscle lie 40 HU apart: 2 % of the whole range
    "offset_weight": 0.2,
    "log_variance_start": -4.0,  # little noise at first
}

_VAE = VAETraining(
    steps=60_000, batch=4, learning_rate=1e-4, clip_norm=0.0, schedule="constant", valid_every=1000,
    workers=2,
)
_CLIP = CLIPTraining(
    steps=100_000, batch=8, learning_rate=5e-5, weight_decay=1e-4, warmup=0.2, clip_norm=0.0, valid_every=1000,
    valid_count=256, workers=2,
)  # fmt: skip
_LDM = LDMTraining(
    steps=700_000,
    batch=8,
    learning_rate=1e-4,
    schedule="polynomial",
    clip_norm=0.0,
    precision="fp16",
    loss="absolute",
    stratified=False,
    valid_every=5000,
    preview_every=5000,
)
PUBLISHED = {"vae": _VAE, "clip": _CLIP, "ldm": _LDM}

# An average, clipping, warm-up; for CLIP3D the batch that caching affords; for diffusion the mean, not the median.
RECOMMENDED = {
    "vae": replace(_VAE, schedule="cosine", warmup=1000.0, clip_norm=1.0, ema=0.999),
    "clip": replace(_CLIP, steps=10_000, batch=128, micro=8, learning_rate=1e-4, clip_norm=1.0, ema=0.999),
    "ldm": replace(
        _LDM, precision="auto", schedule="cosine", warmup=1000.0, clip_norm=1.0, ema=0.9999, loss="squared",
        stratified=True,
    ),
}  # fmt: skip

_EMBEDDED_VAE = VAETraining(
    model=EMBEDDED,
    steps=1900,
    batch=1,
    learning_rate=5e-4,
    matrix_learning_rate=0.006,
    warmup=30.0,
    ema=0.99,
    patches=((96, 96, 24),),  # slabs of whole cross-sections first
    patch_from=(0.0,),
    workers=1,
    finding_weight=0.1,  # else calcifications and lymph nodes, a few voxels of 442 368, are what is lost first
    **OWN_TERMS,  # type: ignore[arg-type]
)
EMBEDDED_RUNS = {
    "vae-slab": _EMBEDDED_VAE,
    # then whole volumes, whose statistics GroupNorm will see in use
    "vae": replace(
        _EMBEDDED_VAE, steps=500, learning_rate=3e-4, matrix_learning_rate=0.004, warmup=20.0, patches=((96, 96, 48),)
    ),
    # What is to be drawn must be read: reports first learn to answer for every finding, then volumes to meet them.
    "clip-text": CLIPTraining(
        model=EMBEDDED, steps=1200, batch=64, learning_rate=1e-3, matrix_learning_rate=0.015, warmup=30.0,
        contrast_weight=0.0, label_weight=10.0, recombine=1.0,
    ),
    "clip": CLIPTraining(
        model=EMBEDDED, steps=700, batch=64, learning_rate=1e-3, matrix_learning_rate=0.02, warmup=30.0, workers=1,
        label_weight=10.0, freeze_text=True, export="float16",
    ),
    "ldm": LDMTraining(
        model=EMBEDDED,
        steps=7800,
        batch=8,
        learning_rate=1e-3,
        matrix_learning_rate=0.008,
        warmup=100.0,
        ema=0.998,
        latents="means",  # a channel that the VAE does not use has sigma 1: a target of noise that nothing predicts
        whiten=True,
        small_weight=3.0,
        export="float16",
        preview_every=1000,
    ),
}  # fmt: skip

TINY_RUNS = {
    "vae": VAETraining(
        model=TINY, steps=100, batch=2, learning_rate=3e-3, matrix_learning_rate=0.02, warmup=10.0, ema=0.95,
        patches=((32, 32, 32),), patch_from=(0.0,), valid_count=4, threads=1, workers=1, **OWN_TERMS,  # type: ignore[arg-type]
    ),
    "clip": CLIPTraining(
        model=TINY, steps=40, batch=16, micro=8, learning_rate=1e-3, warmup=5.0, valid_count=16, threads=1,
    ),
    "ldm": LDMTraining(
        model=TINY, steps=150, batch=8, learning_rate=2e-3, matrix_learning_rate=0.02, warmup=10.0, ema=0.97,
        latents="means", small_weight=12.0, preview_count=1, preview_steps=10, valid_count=8,
        threads=1,
    ),
}  # fmt: skip

_JUDGE = JudgeTraining(
    steps=4000, batch=8, learning_rate=2e-3, matrix_learning_rate=0.04, weight_decay=0.01, warmup=20.0, ema=0.98,
    valid_count=256, valid_every=500, workers=2, export="float16", model=JudgeConfig(details=DETAILS),
)  # fmt: skip
JUDGES = {
    "recommended": replace(  # for scans: eight times the voxels, and all of CT-RATE some thirty times
        _JUDGE, steps=50_000, batch=16, learning_rate=1e-3, matrix_learning_rate=0.02, warmup=1000.0, ema=0.999,
        valid_every=2000, valid_count=2000,
        model=JudgeConfig(size=(192, 192, 96), channels=(24, 48, 96, 160), details=DETAILS),
    ),
    "embedded": _JUDGE,
    "tiny": replace(
        _JUDGE, steps=150, warmup=10.0, ema=0.95, valid_every=0, valid_count=15, threads=1,
        model=JudgeConfig(size=(32, 32, 32), channels=(8, 16, 32), details=DETAILS),
    ),
}  # fmt: skip


def preset(kind: str, name: str) -> Training:
    """The configuration of `kind` ("clip", "vae", "ldm" or "judge") under a preset's name."""
    tables: dict[str, dict[str, Training]] = {
        "published": dict(PUBLISHED), "recommended": dict(RECOMMENDED), "embedded": dict(EMBEDDED_RUNS),
        "tiny": dict(TINY_RUNS),
    }  # fmt: skip
    if name not in tables:
        raise ValueError(f"preset: wanted one of {', '.join(tables)}, got {name!r}")
    if kind == "judge" and name not in JUDGES:
        raise ValueError(f"preset: wanted one of {', '.join(JUDGES)} for the judge, got {name!r}")
    if kind not in ("clip", "vae", "ldm", "judge"):
        raise ValueError(f"kind: wanted clip, vae, ldm or judge, got {kind!r}")
    return JUDGES[name] if kind == "judge" else tables[name][kind]


def default_data(kind: str, name: str) -> str | None:
    """What `--data` is when nothing is said, if there is such a thing."""
    return (JUDGE_DATA if kind == "judge" else DEFAULT_DATA).get(name)


def before(kind: str, name: str) -> list[tuple[str, str, Training]]:
    """What a preset trains before `kind`, as (folder in the run, kind, configuration)."""
    runs: dict[str, dict[str, Training]] = {"embedded": dict(EMBEDDED_RUNS), "tiny": dict(TINY_RUNS)}
    if name not in runs:
        return []
    stages: list[tuple[str, str, Training]] = []
    for network in ("vae", "clip"):
        if kind in (network, "ldm") and FIRST[network] in runs[name]:
            stages.append((FIRST[network], network, runs[name][FIRST[network]]))
        if kind == "ldm":
            stages.append((network, network, runs[name][network]))
    return stages
