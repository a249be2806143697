"""From a configuration and data to a recipe: networks, tokenizer, latents."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from t2ct.files import write_files
from t2ct.models import CLIP3D, VAE, UNet
from t2ct.models.judge import Judge
from t2ct.text import Tokenizer
from t2ct.train.clip import CLIPRecipe
from t2ct.train.config import CLIPTraining, JudgeTraining, LDMTraining, Training, VAETraining
from t2ct.train.data import Source, open_data
from t2ct.train.data.latents import LatentSource, encode_source
from t2ct.train.data.order import note_bad
from t2ct.train.data.phantoms import VALID_COUNT
from t2ct.train.data.source import Unread, cached
from t2ct.train.judge import JudgeRecipe
from t2ct.train.ldm import LDMRecipe
from t2ct.train.parts.folders import load_part, load_tokenizer, start_from
from t2ct.train.parts.lora import add_lora
from t2ct.train.parts.tokens import warn_of_cuts
from t2ct.train.recipe import Distance, Recipe, ranks
from t2ct.train.vae import VAERecipe


def build(
    kind: str, config: Training, data: str, root: Path, device: torch.device, cache: Path, quiet: bool = False,
    perceptual: Distance | None = None,
) -> Recipe:  # fmt: skip
    """The recipe of a run: network, data and all."""
    if perceptual is not None and not isinstance(config, VAETraining):
        raise ValueError(f"perceptual_distance: wanted none for {kind}, whose loss has none, got {perceptual!r:.80}")
    root.mkdir(parents=True, exist_ok=True)
    bad = root / "bad.txt"
    if isinstance(config, LDMTraining):
        return _build_ldm(config, data, root, device, cache, quiet)
    train_set, valid = (_source(config, data, split, cache, bad) for split in ("train", "valid"))
    # Before the network and nothing else: what was drawn, read or encoded until here differs where a run goes on.
    torch.manual_seed(config.seed)
    if isinstance(config, VAETraining):
        vae = VAE(config.model.vae)
        torch.nn.init.constant_(vae.quant_conv_log_sigma.conv.bias, config.log_variance_start)  # type: ignore[arg-type]
        start_from(vae.to(device), config.start, "vae")
        return VAERecipe(config, vae, train_set, valid, bad, perceptual)
    if isinstance(config, JudgeTraining):
        judge = Judge(config.model).to(device)
        start_from(judge, config.start, "judge")
        return JudgeRecipe(config, judge, train_set, valid, bad)
    assert isinstance(config, CLIPTraining)
    tokenizer = _tokenizer(config, train_set, root)
    torch.manual_seed(config.seed)
    clip = CLIP3D(config.model.clip).to(device)
    start_from(clip, config.start, "clip")
    return CLIPRecipe(config, clip, tokenizer, train_set, valid, bad)


def _source(config: Training, data: str, split: str, cache: Path, bad: Path) -> Source:
    left_out: list[str] = []
    labels = isinstance(config, JudgeTraining) or bool(getattr(config, "label_weight", 0))
    source = open_data(
        data, split, config.model.size, texts=isinstance(config, (CLIPTraining, LDMTraining)),
        labels=labels, skip_bad=config.skip_bad, bad=left_out,
        valid_count=max(VALID_COUNT, config.valid_count),
    )  # fmt: skip
    for line in left_out:
        note_bad(bad, line)
    if isinstance(config, CLIPTraining) and not config.contrast_weight:
        return Unread(source)
    return cached(source, cache, config.cache_gb) if len(source) else source


def _tokenizer(config: CLIPTraining, source: Source, root: Path) -> Tokenizer:
    path = root / "tokenizer.json"
    if config.tokenizer or path.exists():
        found = Tokenizer.from_file(config.tokenizer or path)
    elif config.start and not Path(config.start).is_file():
        found = load_tokenizer(config.start)
    else:
        texts = [text for entry in source.entries for text in entry.texts]
        found = Tokenizer.train(texts, config.model.clip.text.vocab_size)
    wanted = config.model.clip.text.vocab_size
    if found.vocab_size != wanted:
        raise ValueError(f"tokenizer: wanted {wanted} tokens (model.clip.text.vocab_size), got {found.vocab_size}")
    if ranks()[0] == 0 and not path.exists():
        write_files({path: found.to_json().encode()})
    if ranks()[0] == 0:
        texts = [text for entry in source.entries for text in entry.texts]
        warn_of_cuts(found, texts, config.model.clip.text.max_length)
    return found


def _build_ldm(
    config: LDMTraining, data: str, root: Path, device: torch.device, cache: Path, quiet: bool
) -> LDMRecipe:  # fmt: skip
    vae, _, digest = load_part(config.vae, "vae", device)
    clip, _, clip_hash = load_part(config.clip, "clip", device)
    tokenizer = load_tokenizer(config.clip)
    former: tuple[CLIP3D, Tokenizer] | None = None
    if config.refit:
        own, _, own_hash = load_part(config.start, "clip", device)
        if own_hash == clip_hash:
            raise ValueError("refit: wanted clip=, a CLIP3D that is not start's own, got the same weights")
        former = own, load_tokenizer(config.start)
    found: dict[str, LatentSource] = {}
    for split in ("train", "valid"):
        ready = Path(data) / split
        if (Path(data) / "train" / "index.json").is_file():
            if (ready / "index.json").is_file():
                found[split] = LatentSource(ready, digest)
            continue
        source = _source(config, data, split, cache, root / "bad.txt")
        if len(source):
            found[split] = encode_source(
                source, vae, digest, root / "latents" / split, device, precision=config.precision,
                skip_bad=config.skip_bad, told=partial(note_bad, root / "bad.txt"), quiet=quiet, workers=config.workers,
                memory_budget=config.memory or None,
            )  # fmt: skip
    torch.manual_seed(config.seed)
    unet = UNet(config.model.unet).to(device)
    start_from(unet, config.start, "unet")
    if config.lora:
        add_lora(unet, config.lora, config.seed)
    return LDMRecipe(config, unet, vae, clip, tokenizer, found["train"], found.get("valid"), former)
