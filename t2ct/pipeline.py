"""Text in, CT volume out: load the three networks, sample, decode."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from t2ct import __version__, weights
from t2ct.checks import (
    FILES,
    check_place,
    check_seed,
    check_size,
    check_spacing,
    find_device,
    find_dtype,
    find_files,
    form_prompts,
)
from t2ct.config import PipelineConfig
from t2ct.data.volume import Volume
from t2ct.diffusion import check_guidance, guided, make_schedule, sample
from t2ct.files import check_output_folder, write_files
from t2ct.models import CLIP3D, VAE, UNet
from t2ct.stream import parse_bytes
from t2ct.text import Tokenizer, form_prompt

OUTPUTS = ("volume", "pt", "np", "latent")
Prompt = str | Mapping[str, str]


class T2CTPipeline:
    """The three networks and a tokenizer, ready to generate. Make one with `from_pretrained`."""

    def __init__(
        self, config: PipelineConfig, vae: VAE, unet: UNet, clip: CLIP3D, tokenizer: Tokenizer, weights_hash: str
    ):
        self.config, self.vae, self.unet, self.clip, self.tokenizer = config, vae, unet, clip, tokenizer
        self.weights_hash = weights_hash
        parameter = next(unet.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    name = property(lambda self: self.config.name)
    size = property(lambda self: self.config.size)
    spacing = property(lambda self: self.config.spacing)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        lora: str | Path | None = None,
    ) -> T2CTPipeline:
        """Load a model.

        model    None or "embedded": the small model in the package. A folder: config.json and the files of
                 `save_pretrained`; or a run of `t2ct train`, which has one.
                 A dict of files: "vae", "unet", "clip" (.pt as published, or .safetensors) and "tokenizer" (a
                 tokenizer.json; the published model uses that of openai/clip-vit-large-patch14), and optionally
                 "config" (a config.json or its dict; default: the published networks).
        device   default: the GPU if there is one
        dtype    default: float16 on a GPU, float32 on a CPU
        lora     a file of adapters that `t2ct train ldm --lora` wrote, added to the UNet's weights

        Only what generation needs is read: of CLIP3D the text tower. A .pt file is opened as data, never as code.
        Raises FileNotFoundError or ValueError (unknown model, missing, truncated or unfitting weights), before any
        network runs.
        """
        device = find_device(device)
        dtype = find_dtype(dtype, device)
        files = find_files(model)
        config = PipelineConfig.from_json(files["config"]) if files["config"] is not None else PipelineConfig()
        config.check_together()
        tokenizer = Tokenizer.from_file(files["tokenizer"])
        if tokenizer.vocab_size != config.clip.text.vocab_size:
            raise ValueError(
                f"tokenizer: wanted {config.clip.text.vocab_size} tokens, "
                f"got {tokenizer.vocab_size} in {files['tokenizer']}"
            )
        with torch.device("meta"):
            vae, unet, clip = VAE(config.vae), UNet(config.unet), CLIP3D(config.clip, towers=("text",))
        networks = {"vae": vae, "unet": unet, "clip": clip}
        loaded = {name: weights.load_into(net, files[name], device, dtype) for name, net in networks.items()}
        if lora is not None:
            from t2ct.train.parts.lora import apply_lora

            loaded["lora"] = {"hash": apply_lora(unet, lora)}
        scale = loaded["unet"]["extras"].get("scale_factor")
        config = config if scale is None else replace(config, scale_factor=scale)
        return cls(config, vae, unet, clip, tokenizer, weights.hash_of(v["hash"] for v in loaded.values()))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, tokenizer.json and the three networks as safetensors in their present dtype.

        `from_pretrained(folder)` gives the same pipeline, bit for bit. Nothing is half-written.
        """
        check_output_folder(folder)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {folder / "config.json": self.config.to_json().encode()}
        content[folder / FILES["tokenizer"]] = self.tokenizer.to_json().encode()
        for name in ("vae", "unet", "clip"):
            state = {k: v.contiguous().cpu() for k, v in getattr(self, name).state_dict().items()}
            content[folder / FILES[name]] = save(state)
        write_files(content)

    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        negative_prompt: str | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        generator: torch.Generator | int | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "volume",
        callback_on_step_end: Callable[[T2CTPipeline, int, float, dict[str, Tensor]], dict[str, Tensor] | None]
        | None = None,
        size: Sequence[int] | None = None,
        spacing: Sequence[float] | None = None,
        progress: bool = True,
        memory_budget: str | float | None = None,
        spool_dir: str | Path | None = None,
    ) -> Any:
        """Generate one CT per prompt.

        prompt                a text, {"findings": …, "impression": …}, or a list of either
        negative_prompt       what guidance leads away from; default: the zero context of the published system
        num_inference_steps   1 to 1000
        guidance_scale        finite; 1 = the conditional velocity alone
        guidance_interval     times from 0 to 1, which is noise, between which there is guidance; the rest costs half
        generator             a seed >= 0, a torch.Generator on the CPU, or None: a seed is drawn and recorded
        latents               the initial noise (B, 4, X/4, Y/4, Z/4) instead of drawing it
        prompt_embeds         (B, L, cross_attention_dim) instead of a prompt
        output_type           "volume": a `Volume`, or a list of them for a list of prompts; "pt", "np": HU as float32
                              (B, X, Y, Z), clipped to +-1000; "latent": latents as diffusion leaves them
        callback_on_step_end  called as f(pipe, step, timestep, {"latents": x}); a dict that it returns replaces them
        size, spacing         voxels and mm; default: what the model was trained on. Every axis of size must be a
                              multiple of `config.factor`
        memory_budget         bytes, or "6GB", for decoding: `VAE.decode`; the same bits whatever it is
        spool_dir             where decoding on a CPU may keep files: `VAE.decode`
        Raises TypeError or ValueError before sampling; RuntimeError if the network gives non-finite numbers.
        """
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type must be one of {OUTPUTS}, got {output_type!r}")
        check_guidance(guidance_scale, guidance_interval)
        size = check_size(self.size if size is None else size, self.config.factor)
        spacing = check_spacing(self.spacing if spacing is None else spacing)
        shape = tuple(n // self.config.vae.factor for n in size)
        as_hu = output_type == "volume"
        if output_type != "latent":  # a budget that is too small shows before the sampling, not after
            latent = (1, self.config.vae.latent_channels, *shape)
            plan = self.vae.plan("decode", latent, memory_budget, spool_dir=spool_dir, hu=as_hu)
        steps = make_schedule(num_inference_steps, int(np.prod(shape)), self.config.schedule, self.config.base_voxels)
        several = prompt is not None and not isinstance(prompt, (str, Mapping))
        texts = form_prompts(prompt, several, prompt_embeds)
        embeds = self._check_embeds(prompt_embeds) if prompt_embeds is not None else self.embed(texts or [])
        negative = None if negative_prompt is None else self.embed([form_prompt(negative_prompt)]).expand_as(embeds)
        batch = len(embeds)
        seed, noise = self._noise(generator, latents, (batch, self.config.unet.in_channels, *shape))

        bar = tqdm(total=len(steps), desc="sampling", disable=not progress)

        def on_step_end(index: int, timestep: float, x: Tensor) -> Tensor | None:
            bar.update()
            if callback_on_step_end is None:
                return None
            changed = callback_on_step_end(self, index, timestep, {"latents": x})
            if changed is not None and not isinstance(changed, Mapping):
                raise TypeError(f"callback_on_step_end: wanted it to return a dict or None, got {changed!r:.80}")
            new = changed.get("latents") if changed else None
            if new is not None and (not isinstance(new, Tensor) or new.shape != x.shape):
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise ValueError(f"callback_on_step_end: wanted latents {tuple(x.shape)}, got {got}")
            return new

        with torch.no_grad(), bar:
            labels = torch.full((batch,), self.config.class_label, dtype=torch.long, device=self.device)
            spaced = (100 * torch.tensor(spacing)).to(self.device, self.dtype).expand(batch, 3)
            predict = guided(self.unet, embeds, negative, guidance_scale, labels, spaced, guidance_interval)
            z = sample(predict, noise, steps, on_step_end)
            if not torch.isfinite(z).all():
                raise RuntimeError(
                    f"sampling gave non-finite latents in {self.dtype}; try dtype=torch.float32 or bfloat16"
                )
        if output_type == "latent":
            return z
        decoded = tqdm(total=batch * plan.flops, desc="decoding", unit="FLOP", unit_scale=True, disable=not progress)
        with torch.no_grad(), decoded:  # one by one: less memory
            units = [
                self.vae.decode(
                    one[None] / self.config.scale_factor,
                    memory_budget,
                    spool_dir=spool_dir,
                    hu=as_hu,
                    step=decoded.update,
                )[0, 0]
                for one in z
            ]
        if output_type in ("pt", "np"):
            hu = torch.stack([(u.float() * 2000 - 1000).clamp_(-1000, 1000) for u in units])
            return hu if output_type == "pt" else hu.cpu().numpy()
        provenance = {
            "steps": int(num_inference_steps),
            "guidance": float(guidance_scale),
            "guidance_interval": [float(t) for t in guidance_interval],
            "negative_prompt": negative_prompt,
            "schedule": self.config.schedule,
            "model": self.name,
            "weights": self.weights_hash,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "version": __version__,
        }
        affine = centred_affine(size, spacing)
        recorded: Sequence[str | None] = texts or [None] * batch
        volumes = [
            Volume(u.cpu().numpy(), affine, text, seed, {**provenance, "batch_index": i})
            for i, (u, text) in enumerate(zip(units, recorded, strict=True))
        ]
        return volumes if several or prompt is None else volumes[0]

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Formed prompts -> context (B, 1, cross_attention_dim). Longer texts are cut at the limit, with a warning."""
        ids = self.tokenizer.encode(texts, self.config.clip.text.max_length).to(self.device)
        with torch.no_grad():
            return self.clip.encode_text(ids)

    def estimate_seconds(self, size: Sequence[int] | None = None, num_inference_steps: int = 30) -> float:
        """About how long a guided volume of `size` takes here: times one pass of each network on a small latent and
        scales by voxels. Attention grows faster, so large volumes take somewhat longer."""
        voxels_of = check_size(self.size if size is None else size, self.config.factor)
        wanted = [n // self.config.vae.factor for n in voxels_of]
        f = self.config.unet.factor
        probe = tuple(max(f, min(n, 16) // f * f) for n in wanted)
        x = torch.zeros(1, self.config.unet.in_channels, *probe, device=self.device, dtype=self.dtype)
        context = torch.zeros(2, 1, self.config.unet.cross_attention_dim, device=self.device, dtype=self.dtype)
        one = torch.ones(1, device=self.device)
        label, spacing = one.long(), torch.ones(1, 3, device=self.device, dtype=self.dtype)
        part = x[..., : max(2, probe[2] // 4)]
        with torch.no_grad():
            unet = self._time(lambda: self.unet(x, one, context, label, spacing))
            vae = self._time(lambda: self.vae.decode(part))
        voxels = float(np.prod(wanted))
        return num_inference_steps * unet * voxels / np.prod(probe) + vae * voxels / np.prod(part.shape[2:])

    def info(self) -> dict[str, str]:
        """What the model consists of, for people."""
        rows = {"model": self.name}
        for name in ("vae", "unet", "clip"):
            count = sum(p.numel() for p in getattr(self, name).parameters())
            rows[name] = f"{count / 1e6:.2f} M parameters{' (text tower)' if name == 'clip' else ''}"
        rows["size"] = " x ".join(map(str, self.size)) + f" voxels, any multiple of {self.config.factor}"
        rows["spacing"] = " x ".join(f"{mm:g}" for mm in self.spacing) + " mm"
        rows["text limit"] = f"{self.config.clip.text.max_length} tokens"
        rows["schedule"], rows["scale factor"] = self.config.schedule, f"{self.config.scale_factor:.6g}"
        rows["device, dtype"] = f"{self.device}, {str(self.dtype).removeprefix('torch.')}"
        rows["weights"] = self.weights_hash
        return rows

    def _noise(self, generator: Any, latents: Tensor | None, shape: tuple[int, ...]) -> tuple[int | None, Tensor]:
        if latents is not None:
            if not isinstance(latents, Tensor):
                raise TypeError(f"latents: wanted a tensor, got {type(latents).__name__}")
            if tuple(latents.shape) != shape or not torch.isfinite(latents).all():
                raise ValueError(f"latents must be finite, {shape}, got {tuple(latents.shape)}")
            return None, latents.to(self.device, self.dtype)
        if generator is None:
            generator = secrets.randbits(31)
        if isinstance(generator, torch.Generator):
            if generator.device.type != "cpu":
                raise ValueError(
                    f"generator must be on the cpu, so that a seed means the same everywhere, got {generator.device}"
                )
            seed = generator.initial_seed()
        else:
            seed = check_seed(generator)
            generator = torch.Generator().manual_seed(seed)
        # drawn on the CPU in float32 whatever the device and dtype: one seed, one noise
        return seed, torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def _check_embeds(self, embeds: Tensor) -> Tensor:
        want = self.config.unet.cross_attention_dim
        if not isinstance(embeds, Tensor):
            raise TypeError(f"prompt_embeds: wanted a tensor, got {type(embeds).__name__}")
        if embeds.dim() != 3 or not embeds.shape[0] or not embeds.shape[1] or embeds.shape[2] != want:
            raise ValueError(f"prompt_embeds must be (B, L, {want}), got {tuple(embeds.shape)}")
        if not torch.isfinite(embeds).all():
            raise ValueError("prompt_embeds must be finite, got NaN or infinity")
        return embeds.to(self.device, self.dtype)

    def _time(self, run: Callable[[], Tensor]) -> float:
        for _ in range(2):  # the first run pays for first touches and kernel choice
            start = time.perf_counter()
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def generate(
    text: Prompt,
    *,
    model: T2CTPipeline | str | Path | Mapping[str, Any] | None = None,
    num_inference_steps: int = 30,
    guidance_scale: float = 5.0,
    guidance_interval: Sequence[float] = (0.0, 1.0),
    seed: int | None = None,
    size: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    negative_prompt: str | None = None,
    memory_budget: str | float | None = None,
    spool_dir: str | Path | None = None,
) -> Volume:
    """A chest CT from the text of a report.

    text    a sentence or a report, or {"findings": …, "impression": …}, formed as the model was trained
    model   default: the small model in the package; see `T2CTPipeline.from_pretrained`; or a loaded pipeline, which
            stays where it is: another device or dtype is refused
    seed    >= 0; the same seed gives the same bits on the same device. None draws one, recorded in the volume
    size    voxels (X, Y, Z); spacing mm; default: what the model was trained on
    memory_budget, spool_dir  bytes or "6GB" for decoding, and a folder for what does not fit: `VAE.decode`
    Returns a `Volume`: int16 HU, RAS affine in mm. Errors as `T2CTPipeline.__call__`, all before sampling.
    """
    form_prompt(text)  # the cheap checks first: loading may take a while
    check_guidance(guidance_scale, guidance_interval)
    make_schedule(num_inference_steps, 1)
    if seed is not None:
        check_seed(seed)
    if size is not None:
        check_size(size, 4)
    if spacing is not None:
        check_spacing(spacing)
    if memory_budget is not None:
        parse_bytes(memory_budget)
    if isinstance(model, T2CTPipeline):
        check_place(model, device, dtype)
    pipe = model if isinstance(model, T2CTPipeline) else _cached(model, device, dtype)
    return pipe(
        text,
        negative_prompt=negative_prompt,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        generator=seed,
        size=size,
        spacing=spacing,
        progress=progress,
        memory_budget=memory_budget,
        spool_dir=spool_dir,
    )


def centred_affine(size: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """Voxel -> RAS mm, the origin in the middle of the volume."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * mm for n, mm in zip(size, spacing, strict=True)]
    return affine


@lru_cache(maxsize=1)
def _loaded(key: str, files: tuple, device: str | None, dtype: torch.dtype | None) -> T2CTPipeline:
    return T2CTPipeline.from_pretrained(json.loads(key), device, dtype)


def _cached(model: Any, device: Any, dtype: torch.dtype | None) -> T2CTPipeline:
    """The pipeline of the last call, if this one asks for the same: a second `generate` need not load again."""
    try:
        key = json.dumps(model, default=lambda p: str(p) if isinstance(p, Path) else asdict(p))
    except TypeError:
        return T2CTPipeline.from_pretrained(model, device, dtype)
    return _loaded(key, _files(model), None if device is None else str(device), dtype)


def _files(model: Any) -> tuple:
    """What lies in the files of a model now: one that was trained further, or another folder of the same name, is read
    anew."""
    paths = [Path(p) for p in (model.values() if isinstance(model, Mapping) else [model]) if isinstance(p, (str, Path))]
    found = [f for p in paths for f in (sorted(p.iterdir()) if p.is_dir() else [p]) if f.is_file()]
    return tuple((str(f.resolve()), f.stat().st_mtime_ns, f.stat().st_size) for f in found)
