"""What a training run is told: one frozen dataclass for each network, from TOML and from the command line.

The same fields everywhere: `--config run.toml`, `--set learning_rate=3e-4`, `train("vae", learning_rate=3e-4)`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from t2ct.config import PipelineConfig
from t2ct.models.fields import LARGEST, POSITIVE, SHARE, SIZE, Range, check_fields, check_grid
from t2ct.models.judge import JudgeConfig
from t2ct.stream import parse_bytes

C = TypeVar("C")
PRECISIONS = ("auto", "bf16", "fp16", "float32")
OFFLOADS = ("none", "average", "optimiser")
SHARDS = ("none", "optimiser", "all")
SCHEDULES = ("cosine", "polynomial", "constant")


# A module that draws on its own is seeded with seed * 1_000_003 + step, and torch takes 64 bits.
LARGEST_SEED = 2**43 - 1
COUNT, POSITIVE_COUNT = Range(0, 10**9), Range(1, 10**9)


def key(
    default: Any, meaning: str, *, free: bool = False, choices: tuple[Any, ...] = (), within: Range | None = None
) -> Any:
    """A field with the comment that --init writes; free: a run that goes on may have another value; within: the range
    of its numbers, by default from 0 on."""
    within = within or (COUNT if type(default) is int else Range())
    return field(default=default, metadata={"help": meaning, "free": free, "choices": choices, "within": within})


@dataclass(frozen=True)
class Training:
    """What every recipe has."""

    steps: int = key(1000, "updates of the weights", within=POSITIVE_COUNT)
    seed: int = key(0, "the same seed, data and machine give the same weights", within=Range(0, LARGEST_SEED))
    batch: int = key(8, "samples in an update, over all devices", within=Range(1, 2**16))
    micro: int = key(
        0, "samples that a device holds at once; 0: its whole share; --memory may hold fewer", free=True
    )
    memory: str = key("", 'what a device may use, such as "24GB"; empty: no plan is made', free=True)
    optimiser_bits: int = key(32, "of each of Adam's moments; 8: blocks of 256 with a scale (torchao)", choices=(32, 8))
    offload: str = key(
        "none", "what a device leaves to the host's memory: the average, or the optimisers too", choices=OFFLOADS
    )
    shard: str = key(
        "none", "what each of several devices keeps its share of: the optimisers (ZeRO-1), or weights and gradients "
        "too (all: FSDP2)", choices=SHARDS
    )  # fmt: skip
    checkpoint_blocks: bool = key(False, "compute the insides of blocks again for the gradient instead of keeping them")
    learning_rate: float = key(1e-4, "of Adam: of every parameter, or, beside Muon, of vectors and embeddings")
    matrix_learning_rate: float = key(0.0, "of Muon, for matrices and convolutions; 0: Adam for all")
    weight_decay: float = key(0.0, "decoupled, as in AdamW")
    schedule: str = key("cosine", "of the learning rate after the warm-up", choices=SCHEDULES)
    power: float = key(2.0, "of the polynomial schedule", within=POSITIVE)
    warmup: float = key(0.0, "steps of linear warm-up, or their share of all steps where it is below 1")
    clip_norm: float = key(1.0, "longest gradient; 0: no clipping")
    ema: float = key(
        0.0, "decay of the float32 average of the weights, which is what is used in the end; 0: none",
        within=Range(0, 1, open_high=True),
    )  # fmt: skip
    precision: str = key("auto", "auto: bf16 where the device multiplies it natively", choices=PRECISIONS)
    max_bad_steps: int = key(10, "steps in a row without a finite gradient before the run stops", within=POSITIVE_COUNT)
    start: str = key("", "weights to begin with: a safetensors file, or the folder of a run or a model")
    export: str = key("float32", "dtype of the weights in RUN/final", choices=("float32", "float16", "bfloat16"))
    actual_spacing: bool = key(False, "tell the network the voxel size after fitting, not the model's nominal one")
    skip_bad: bool = key(False, "put the next volume in the place of one that cannot be read", free=True)
    cache_gb: float = key(16.0, "keep prepared volumes on disk if all of them fit; 0: never", free=True)
    threads: int = key(
        0, "of a CPU for each process; small networks are faster with 1; 0: torch's own choice", within=Range(0, 1024)
    )
    workers: int = key(0, "processes that read volumes ahead", free=True, within=Range(0, 1024))
    log_every: int = key(10, "steps between rows of metrics.csv", free=True, within=POSITIVE_COUNT)
    valid_every: int = key(0, "steps between validations; 0: at the end only")
    valid_count: int = key(16, "volumes of the validation split that are looked at", within=POSITIVE_COUNT)
    save_every: int = key(0, "steps between checkpoints; 0: by time alone", free=True)
    save_minutes: float = key(5.0, "minutes between checkpoints", free=True)
    keep: int = key(2, "newest checkpoints kept, besides the best", free=True, within=POSITIVE_COUNT)
    tensorboard: bool = key(False, "also write TensorBoard's files (needs the package tensorboard)", free=True)
    model: Any = field(default_factory=PipelineConfig)  # of the judge: a JudgeConfig

    def __post_init__(self) -> None:
        check_fields(self, **{f.name: f.metadata["within"] for f in fields(self) if "within" in f.metadata})
        for f in fields(self):
            choices = f.metadata.get("choices", ())
            if choices and getattr(self, f.name) not in choices:
                wanted = ", ".join(map(str, choices))
                raise ValueError(f"{f.name}: wanted one of {wanted}, got {getattr(self, f.name)!r}")
        if self.memory:
            parse_bytes(self.memory, "memory")
        if self.shard == "all" and self.optimiser_bits != 32:  # a block of 256 would lie on two devices
            raise ValueError(f"shard: wanted none or optimiser beside optimiser_bits={self.optimiser_bits}, got 'all'")


@dataclass(frozen=True)
class VAETraining(Training):
    """L1 + KL + perceptual + adversarial, as MAISI, or the terms that need no other network."""

    patches: tuple[tuple[int, int, int], ...] = key(
        ((64, 64, 64), (128, 128, 128)), "voxels, one size after another", within=SIZE
    )
    patch_from: tuple[float, ...] = key((0.0, 0.8), "share of the steps after which each size begins", within=SHARE)
    augment: bool = key(True, "flips, quarter turns, zoom, rotation, brightness and contrast")
    kl_weight: float = key(1e-7, "of the KL divergence, summed over a sample")
    kl_per_voxel: bool = key(False, "divide the KL by the voxels of the patch")
    perceptual: str = key("random", "random: features of fixed random convolutions", choices=("random", "none"))
    perceptual_weight: float = key(0.3, "of the perceptual distance")
    adversarial_weight: float = key(0.1, "of the critic's judgement (LSGAN); 0: no critic")
    critic_from: float = key(0.1, "share of the steps before the critic's judgement counts", within=SHARE)
    critic_learning_rate: float = key(1e-4, "of the critic's Adam")
    critic_channels: int = key(32, "of the critic's first layer", within=SIZE)
    critic_layers: int = key(3, "of the critic that halve the volume", within=Range(1, 8))
    edge_weight: float = key(0.0, "of the L1 of differences between neighbouring voxels")
    square_weight: float = key(0.0, "of the squared error: small bright things are few voxels, and L1 is a median")
    window_weight: float = key(0.0, "of the L1 in the mediastinal window, as a share of its width")
    finding_weight: float = key(
        0.0, "share of a volume that each finding counts as, besides its own, where it is known (phantoms)"
    )
    offset_weight: float = key(1.0, "of the common offset of a sample; below 1 it is taken out of the other terms")
    log_variance_start: float = key(
        0.0, "bias with which the log variance of the latents begins", within=Range(-30, 20)
    )

    def __post_init__(self) -> None:
        if not isinstance(self.patches, (tuple, list)) or not self.patches:
            raise ValueError(f"patches: wanted at least one size, such as [[64, 64, 64]], got {self.patches!r:.200}")
        super().__post_init__()
        if self.finding_weight and self.augment:
            raise ValueError("finding_weight: wanted augment=false, since findings lie where they were, got true")

    def check_patches(self) -> None:
        """ValueError unless patches, their order, volumes and networks fit: what is told apart, and looked at together
        in the end."""
        for patch in self.patches:
            check_grid("patches", patch, self.model.vae.factor, self.model.size)
        starts = self.patch_from
        if len(starts) != len(self.patches) or list(starts) != sorted(starts) or starts[0] != 0:
            raise ValueError(f"patch_from: wanted {len(self.patches)} rising shares from 0, got {starts}")
        least = 3 * 2**self.critic_layers  # what is left of less is smaller than the critic's last convolutions
        if self.adversarial_weight and min(map(min, self.patches)) < least:
            wanted = f"at least {least} voxels along every axis for a critic of {self.critic_layers} layers"
            raise ValueError(f"patches: wanted {wanted} (adversarial_weight=0: none), got {self.patches}")


@dataclass(frozen=True)
class CLIPTraining(Training):
    """Symmetric InfoNCE of volumes and reports; `micro` below `batch` caches gradients, the result is the same."""

    tokenizer: str = key("", "a tokenizer.json; empty: that of `start`, or one is learnt from the reports")
    codebook_decay: float = key(0.8, "of the quantiser's codes, which follow the tokens", within=SHARE)
    dead_share: float = key(
        0.03, "of an even share of the tokens, under which a code is given a new place", within=SHARE
    )
    contrast_weight: float = key(1.0, "of InfoNCE; 0: no volume is looked at, and reports learn from answers alone")
    freeze_text: bool = key(False, "only the vision tower learns: it meets reports where they are (of `start`)")
    label_weight: float = key(0.0, 'of the answers that both embeddings give to "X is present."; above 0 needs labels')
    recombine: float = key(
        0.0, "share at first of texts put together of several reports' sentences (of phantoms)", within=SHARE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.contrast_weight and not self.label_weight:
            raise ValueError("contrast_weight: wanted more than 0, or a label_weight to learn from, got 0 for both")
        if self.recombine and (self.contrast_weight or not self.label_weight):
            raise ValueError(
                "recombine: wanted contrast_weight 0 and a label_weight, since these texts have no volume, got "
                f"{self.contrast_weight:g} and {self.label_weight:g}"
            )
        if self.freeze_text and not self.contrast_weight:
            raise ValueError("freeze_text: wanted a contrast_weight above 0, or nothing would learn, got 0")


@dataclass(frozen=True)
class LDMTraining(Training):
    """Rectified flow's velocity on latents, the text dropped for some samples."""

    vae: str = key("", "a VAE's run or model folder; empty: the preset tiny or embedded trains its own")
    clip: str = key("", "a CLIP3D's run or model folder; empty: the preset tiny or embedded trains its own")
    loss: str = key("squared", "of the velocity's error", choices=("squared", "absolute"))
    time: str = key("uniform", "law of the times before the shift", choices=("uniform", "logit-normal"))
    shift: bool = key(True, "shift times towards noise as sampling does")
    stratified: bool = key(True, "one time in each stratum of a batch: the same law, less noise in the loss")
    group: int = key(
        1, "samples that come together under the same noise, at the same time: the K of phantoms:NxK, one patient's",
        within=POSITIVE_COUNT,
    )  # fmt: skip
    latents: str = key("sampled", "sampled: mu + sigma * fresh noise", choices=("sampled", "means"))
    min_snr: float = key(
        0.0, "gamma of the weights t^2 min(SNR, gamma), SNR = ((1 - t) / t)^2 (arXiv 2303.09556); 0: none"
    )
    text_dropped: float = key(0.1, "share of samples that see no text", within=SHARE)
    text_noise: float = key(0.0, "length of the noise added to a text's unit vector")
    whiten: bool = key(False, "contexts as wide in every direction; the weights take that up in the end")
    refit: bool = key(False, "start's UNet knows contexts of start's CLIP3D: fit it to those of `clip` first")
    small_weight: float = key(0.0, "further weight of latent voxels a quarter full of a small finding")
    finding_weight: float = key(
        0.0, "share of a volume that each finding counts as, besides its own, where it is known (phantoms)"
    )
    lora: int = key(0, "rank of low-rank adapters that alone are trained; 0: all weights", within=Range(0, 1024))
    preview_every: int = key(0, "steps between volumes of fixed prompts; 0: at the end only")
    preview_count: int = key(2, "prompts of the validation split that are drawn")
    preview_steps: int = key(30, "sampling steps of a preview", within=Range(1, 1000))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refit and (self.lora or not self.start):
            got = "lora, whose adapters are kept without the weights" if self.lora else "none"
            raise ValueError(f"refit: wanted start=, a model's folder with its CLIP3D, and no lora, got {got}")
        if self.batch % self.group:
            raise ValueError(f"group: wanted a part of batch={self.batch} that divides it, got {self.group}")
        if self.whiten and self.lora:
            raise ValueError("whiten: wanted false beside lora, whose adapters are kept without the weights, got true")


@dataclass(frozen=True)
class JudgeTraining(Training):
    """Binary cross entropy of the findings, each for itself, of their details, and where they lie."""

    flip: bool = key(True, "left for right in half of the samples: labels have no sides")
    move: int = key(2, "voxels at most by which a sample is moved along each axis, by an even number")
    shift_hu: float = key(20.0, "HU at most by which a sample is made brighter or darker")
    noise_hu: float = key(0.0, "standard deviation at most of the noise added to a sample, HU")
    detail_weight: float = key(0.3, "of what reports tell besides: side, lobe and size of the findings they assert")
    place_weight: float = key(1.0, "of where the findings are, for volumes of which that is known (phantoms)")
    balance: float = key(0.5, "a finding's cases weigh (cases without / cases with) to this power; 0: as all others")
    model: JudgeConfig = field(default_factory=JudgeConfig)


KINDS: dict[str, type[Training]] = {
    "clip": CLIPTraining, "vae": VAETraining, "ldm": LDMTraining, "judge": JudgeTraining,
}  # fmt: skip


def check_keys(config: type, names: Iterable[str], where: str) -> None:
    """ValueError where one is no field of the dataclass `config`, with the nearest that is."""
    known = {f.name for f in fields(config)}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 1, cutoff=0.0)[0]
            raise ValueError(f"{where}: unknown key {name!r}; the nearest is {near!r}")


def updated(config: C, values: Mapping[str, Any], where: str = "config") -> C:
    """`config` with `values`, nested as in TOML. ValueError names an unknown key's nearest, or what a value must be."""
    hints = get_type_hints(type(config))
    check_keys(type(config), values, where)
    changes: dict[str, Any] = {}
    for name, value in values.items():
        old, place = getattr(config, name), f"{where}.{name}"
        if is_dataclass(old):
            if not isinstance(value, Mapping):
                raise ValueError(f"{place}: wanted a table, got {value!r}")
            changes[name] = updated(old, value, place)
        else:
            changes[name] = _fitting(value, hints[name], place)
    try:
        return replace(config, **changes)  # type: ignore[type-var]
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None


def _fitting(value: Any, kind: Any, place: str) -> Any:
    if isinstance(value, (list, tuple)):
        return _deep_tuple(value) if "tuple" in str(kind) else _refuse(value, kind, place)
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return float(value)
    return value if type(value) is kind else _refuse(value, kind, place)


def _deep_tuple(value: Any) -> Any:
    return tuple(_deep_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value


def _refuse(value: Any, kind: Any, place: str) -> Any:
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    raise ValueError(f"{place}: wanted {names.get(kind, 'a list')}, got {value!r}")


def read_toml(text: str, where: str = "config") -> dict[str, Any]:
    """TOML as a dict; ValueError where it is none."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[no-redef,import-not-found]
        except ImportError:
            raise ValueError(f"{where}: TOML needs Python 3.11, or the package tomli on 3.10") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}: wanted TOML, got {error}") from None


def read_override(word: str) -> dict[str, Any]:
    """`learning_rate=3e-4` or `model.vae.channels=[8, 16]` as nested dicts; a bare word is a text."""
    name, equals, value = word.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"--set: wanted KEY=VALUE, got {word!r}")
    try:
        parsed: Any = read_toml(f"value = {value}")["value"]
    except ValueError:
        parsed = value.strip()
    for part in reversed(name.strip().split(".")):
        parsed = {part: parsed}
    return parsed


def to_toml(config: Any, table: str = "", comments: bool = False) -> str:
    """The config as TOML that `updated` reads back; comments: what each key means."""
    lines, tables = [], []
    for f in fields(config):
        value, name = getattr(config, f.name), f"{table}.{f.name}".lstrip(".")
        if is_dataclass(value):
            tables.append(f"\n[{name}]\n{to_toml(value, name, comments)}")
            continue
        note = f.metadata.get("help", "")
        if f.metadata.get("choices"):
            note += f" ({' | '.join(map(str, f.metadata['choices']))})"
        lines.append(f"{f.name} = {_toml(value)}" + (f"  # {note}" if comments and note else ""))
    return "\n".join(lines) + "\n" + "".join(tables)


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        return f"{value:.1f}"
    return json.dumps(value, ensure_ascii=False)


def differences(other: Training, new: Training) -> list[str]:
    """What a run that goes on would have changed: "learning_rate: the run has 0.001, got 0.01"."""
    return [
        f"{f.name}: the run has {getattr(other, f.name)!r}, got {getattr(new, f.name)!r}"
        for f in fields(new)
        if not f.metadata.get("free") and getattr(other, f.name) != getattr(new, f.name)
    ]


def load_config(path: str | Path, config: C) -> C:
    """`config` with what the TOML file at `path` says."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"config: wanted a TOML file, got {str(path)!r}, which is not there")
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark of its encoding
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted TOML in UTF-8, got {error}") from None
    return updated(config, read_toml(text, str(path)), str(path))
