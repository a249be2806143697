"""`train("vae", …)`: from a preset and a data set to a folder with the final weights. `t2ct train` calls it."""

from __future__ import annotations

import atexit
import json
import os
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from t2ct.checks import find_device
from t2ct.files import check_output_folder, write_files
from t2ct.train import loop
from t2ct.train.build import build
from t2ct.train.config import (
    KINDS,
    CLIPTraining,
    LDMTraining,
    Training,
    differences,
    load_config,
    read_toml,
    to_toml,
    updated,
)  # fmt: skip
from t2ct.train.data import open_data
from t2ct.train.memory import Plan, checkpoint_blocks, make_plan
from t2ct.train.optim import check_optimiser
from t2ct.train.parts.folders import find_folder, run_facts
from t2ct.train.parts.ready import absolute, check_data, check_numbers, check_weights
from t2ct.train.presets import FIRST, before, default_data, preset
from t2ct.train.recipe import Distance, by_itself, one_message, ranks
from t2ct.train.show.report import write_report

FORMAT = "t2ct-run-1"


def configure(
    kind: str, preset_name: str = "recommended", config: str | Path | None = None, **values: Any
) -> Training:  # fmt: skip
    """The configuration of a run: the preset, then the TOML file `config`, then `values` (None: not said)."""
    if kind not in KINDS:
        raise ValueError(f"kind: wanted one of {', '.join(KINDS)}, got {kind!r}")
    made = preset(kind, preset_name)
    if config is not None:
        made = load_config(config, made)
    given = {name: value for name, value in values.items() if value is not None}
    if given.get("lora") and "whiten" not in given and isinstance(made, LDMTraining):
        made = replace(made, whiten=False)  # the preset's; adapters are kept without the weights that it goes into
    return updated(made, given, "option")


def train(
    kind: str,
    data: str | None = None,
    out: str | Path = "",
    *,
    preset: str = "recommended",
    config: str | Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    device: str | torch.device | None = None,
    quiet: bool = False,
    cache: str | Path | None = None,
    perceptual_distance: Distance | None = None,
    **values: Any,
) -> Path:
    """Train a network and return the folder with its final weights, `out`/final.

    kind     "vae", "clip", "ldm" or "judge"
    data     "phantoms:N" or "phantoms:NxK", a prepared folder, a CT-RATE-shaped folder, or for "ldm" a folder of
             latents; the presets tiny and embedded have phantoms of their own
    out      the run's folder; one that holds a run is refused unless `resume`, which goes on, or begins where there is
             none
    preset   "published", "recommended", "embedded" or "tiny"; config: a TOML file on top of it; then **values, the
             fields of `t2ct.train.config` (steps, seed, learning_rate, model={"vae": {…}}, …)
    dry_run  print what it would cost, write nothing
    cache    folder for prepared volumes, which runs on the same data may share; default: `out`/cache
    perceptual_distance  of the VAE: f(x, y) of volumes (B, 1, X, Y, Z) in [0, 1] -> a scalar, instead of that in the
             features of random convolutions
    Raises ValueError, TypeError, FileNotFoundError for what is wrong with the arguments or the data, OSError for a full
    disk, RuntimeError for gradients that are not finite; `t2ct.train.loop.Preempted` after SIGTERM or SIGUSR1.
    """
    made = absolute(configure(kind, preset, config, **values))
    check_optimiser(made)
    alone = not _stages_left(kind, preset, made)
    check_weights(kind, made, alone)
    spec = data or default_data(kind, preset)
    if spec is None:
        raise ValueError(f"data: wanted a folder or phantoms:N for the preset {preset}, got nothing")
    _join()
    check_numbers(made, ranks()[1])
    threads = torch.get_num_threads()
    try:
        where = find_device(device)
        if where.type == "cuda" and ranks()[1] > 1:
            where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", ranks()[0])) % torch.cuda.device_count())
            torch.cuda.set_device(where)  # where barriers wait, too
        if made.threads:
            torch.set_num_threads(made.threads)
        root = Path(out)
        named = not isinstance(made, LDMTraining) or made.start or (made.vae and made.clip)
        if alone and (named or not dry_run):  # what it costs may be asked before there is a VAE
            made = _resolved(kind, made, root, preset)
        looked = _check_labels(kind, preset, made, spec)
        if not looked and (dry_run or not alone):  # else it is opened at once; and large folders are not walked twice
            check_data(made, spec)
        if dry_run:
            told = partial(print, flush=True) if not quiet else lambda _: None
            for name, stage, early in _stages_left(kind, preset, made):
                print(f"first its {name}:")
                print(make_plan(stage, _told(kind, preset, made, early, spec), where, ranks()[1], told).text())
            print(make_plan(kind, made, where, ranks()[1], told).text())
            return root
        if not str(out):
            raise ValueError("out: wanted a folder for the run, got nothing")
        for folder in (root, Path(cache or root)):
            check_output_folder(folder)
        _refuse_other(root, kind, preset, spec, resume)
        prepared = Path(cache) if cache else root / "cache"
        if not alone:
            _stages(kind, preset, made, spec, root, where, quiet, prepared)
            made = _resolved(kind, made, root, preset)
        with one_message():
            return _train(kind, made, preset, spec, root, where, quiet, prepared, perceptual_distance)
    finally:
        torch.set_num_threads(threads)


def _join() -> None:
    """Join the other processes of torchrun, if it launched this one and nobody has joined yet.

    Once, for the life of the process: who leaves and joins again may find the addresses that the others had before, in
    the same store, and wait for them without end.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    # What the ranks agree on (stop, skip, the plan) are numbers on the CPU; gradients lie on the GPUs.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # hours: the first rank draws previews and writes checkpoints while the others wait
    dist.init_process_group(backend, timeout=timedelta(hours=12))
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _refuse_other(root: Path, kind: str, preset: str, data: str, resume: bool) -> None:
    if ranks()[0] == 0:  # the first process looks for all of them: where it ends, torchrun ends the others
        _refuse_other_here(root, kind, preset, data, resume)
    _wait()


def _wait() -> None:
    if ranks()[1] > 1:
        dist.barrier()


def _refuse_other_here(root: Path, kind: str, preset: str, data: str, resume: bool) -> None:
    path = root / "run.json"
    started = root / "starting.json"  # of a run that was killed in the stages before its own
    if not path.exists() and not (started.exists() and _made_something(root)):
        root.mkdir(parents=True, exist_ok=True)
        write_files({started: json.dumps({"kind": kind, "preset": preset, "data": data}).encode()})
        return
    facts = run_facts(path if path.exists() else started)
    if not resume:
        held = f"{facts['kind']} ({facts['preset']}, {facts['data']})"
        raise ValueError(f"out: wanted a new folder, got {root}, which holds a run of {held}; --resume goes on with it")
    wanted = {"kind": kind, "preset": preset, "data": data}
    for name, value in wanted.items():
        if facts[name] != value:
            raise ValueError(f"out: {root} holds a run with {name} {facts[name]!r}, got {value!r}")


def _made_something(root: Path) -> bool:
    """Has a run that was stopped before its own first update left more than its name and prepared volumes?"""
    return any(folder.is_dir() and folder.name != "cache" and any(folder.iterdir()) for folder in root.iterdir())


def _stages_left(kind: str, name: str, config: Training) -> list[tuple[str, str, Training]]:
    """What is to be trained before the network itself, as `presets.before` says."""
    return [stage for stage in before(kind, name) if not _given(config, stage[1])]


def _stages(
    kind: str, name: str, config: Training, data: str, root: Path, device: Any, quiet: bool, cache: Path
) -> None:  # fmt: skip
    """Train what a preset of its own needs before, each stage in a folder of the run."""
    for folder, stage, told in _stages_left(kind, name, config):
        told = _started(_told(kind, name, config, told, data), folder, root)
        if stage != "ldm" and (root / folder / "final" / "config.json").exists():
            if ranks()[0] == 0:
                _known(root / folder, told)
            continue
        if ranks()[0] == 0 and not quiet:
            print(f"{root}: first its {folder}, {told.steps} steps", flush=True)
        rank, world = ranks()
        if told.batch % world == 0:
            _refuse_other(root / folder, stage, name, data, True)
            _train(stage, told, name, data, root / folder, device, quiet, cache)
            continue
        if rank == 0:  # one sample an update is for one process; the others wait
            with by_itself():
                _refuse_other(root / folder, stage, name, data, True)
                _train(stage, told, name, data, root / folder, device, quiet, cache)
        _wait()


def _told(kind: str, name: str, config: Training, stage: Training, data: str) -> Training:
    """What a stage before the network's own is told of the network's configuration: the seed, the precision, and what
    else was said that changes no number."""
    own = preset(kind, name)
    free = {f.name for f in fields(stage) if f.metadata.get("free")} - {"micro"} | {"seed", "precision"}
    stage = replace(stage, **{f: getattr(config, f) for f in free if getattr(config, f) != getattr(own, f)})
    if isinstance(stage, CLIPTraining) and stage.recombine and not data.startswith("phantoms:"):
        stage = replace(stage, recombine=0.0)  # the reader of sentences knows the words of phantoms' reports
    return stage


def _given(config: Training, stage: str) -> bool:
    """Is what this stage would train given already, or nothing to it?"""
    given = isinstance(config, LDMTraining) and bool(getattr(config, stage))
    unasked = isinstance(config, CLIPTraining) and not config.label_weight  # no answers to teach reports by
    return given or unasked or bool(config.start)


def _check_labels(kind: str, preset_name: str, config: Training, data: str) -> bool:
    """ValueError where a later stage's CLIP3D lacks labels to learn from, or volumes for a batch: hours before it would
    say so. Were the data opened for that?"""
    told = [config, *(c for _, _, c in _stages_left(kind, preset_name, config))]
    clips = [c for c in told if isinstance(c, CLIPTraining)]
    if not any(c.label_weight for c in clips) or (Path(data) / "train" / "index.json").is_file():
        return False
    try:
        source = open_data(data, "train", config.model.size, labels=True, skip_bad=config.skip_bad)
    except ValueError as error:
        way = "--set clip=RUN takes a CLIP3D that is trained" if kind == "ldm" else "--set label_weight=0 does without"
        raise ValueError(f"{error}; the CLIP3D of the preset {preset_name} learns from labels: {way}") from None
    if (batch := max(c.batch for c in clips)) > len(source):
        raise ValueError(f"batch: wanted at most the {len(source)} volumes of the data, got {batch} for the CLIP3D")
    return True


def _started(config: Training, folder: str, root: Path) -> Training:
    """The configuration that begins where its first stage in the run, if it has one, ended."""
    first = root / FIRST.get(folder, "")
    known = folder in FIRST and first.is_dir() and not config.start
    return replace(config, start=os.path.abspath(first)) if known else config


def _resolved(kind: str, config: Training, root: Path, name: str) -> Training:
    """The configuration with the networks that it stands on."""
    if kind in FIRST:
        return _started(config, kind, root)
    if not isinstance(config, LDMTraining):
        return config
    paths = {part: getattr(config, part) or config.start or os.path.abspath(root / part) for part in ("vae", "clip")}
    for part, path in paths.items():
        if not getattr(config, part) and not config.start and not (root / part).is_dir():
            raise ValueError(
                f"{part}: wanted the run or the folder of a trained {part.upper()}, got nothing "
                f'(--set {part}=DIR, or "embedded"; the presets tiny and embedded train their own)'
            )
        find_folder(path, part)
    vae_of, clip_of = (_config_of(paths[part], part) for part in ("vae", "clip"))
    model = replace(config.model, vae=vae_of.vae, clip=clip_of.clip, size=vae_of.size, spacing=vae_of.spacing)
    if config.start and not Path(config.start).is_file():
        start = _config_of(config.start, "start")
        model = replace(model, unet=start.unet, schedule=start.schedule, base_voxels=start.base_voxels)
    wanted = (model.clip.embed_dim, model.vae.latent_channels)
    got = (model.unet.cross_attention_dim, model.unet.in_channels)
    if wanted != got:
        raise ValueError(f"model.unet: wanted cross_attention_dim and in_channels {wanted}, got {got}")
    return replace(config, model=model, vae=paths["vae"], clip=paths["clip"])


def _config_of(path: str, part: str) -> Any:
    from t2ct.config import PipelineConfig

    return PipelineConfig.from_json(find_folder(path, part) / "config.json")


def _train(
    kind: str, config: Training, name: str, data: str, root: Path, device: torch.device, quiet: bool, cache: Path,
    perceptual: Distance | None = None,
) -> Path:  # fmt: skip
    rank, world = ranks()
    if config.threads:
        torch.set_num_threads(config.threads)
    facts = {"format": FORMAT, "kind": kind, "preset": name, "data": data, "steps": config.steps}
    plan = _known(root, config) if rank == 0 else {}
    recipe = build(kind, config, data, root, device, cache, quiet, perceptual)
    if rank == 0:
        began = dict(plan)
        if not plan or (config.memory and config.memory != plan.get("memory")):
            found = _plan(kind, config, device, quiet)
            plan = {
                "micro": found.micro, "checkpoint_blocks": found.checkpoint, "offload": found.offload,
                "shard": found.shard, "memory": config.memory,
            }  # fmt: skip
        plan["micro"] = _dividing(config.batch // world, config.micro or plan["micro"])
        if plan != began:
            content = {root / "config.toml": to_toml(config).encode()}
            write_files(content | {root / "run.json": json.dumps({**facts, **plan}, indent=1).encode()})
    if world > 1:  # what the first process decided holds for all
        plans = [plan]
        dist.broadcast_object_list(plans)
        plan = plans[0]
    if plan["checkpoint_blocks"]:
        checkpoint_blocks(recipe.parts)
    config = replace(config, **{name: plan.get(name, getattr(config, name)) for name in ("offload", "shard")})
    loop.run(recipe, config, root, device, plan["micro"], quiet)
    if rank == 0:
        write_report(root)
    return root / "final"


def _dividing(share: int, most: int) -> int:
    """The largest micro-batch up to `most` that a device's share consists of."""
    return next(n for n in range(min(share, most), 0, -1) if share % n == 0)


def _plan(kind: str, config: Training, device: torch.device, quiet: bool) -> Plan:
    _, world = ranks()
    check_numbers(config, world)
    share = config.batch // world
    if not config.memory:
        return Plan(config.micro or share, share, config.checkpoint_blocks, offload=config.offload, shard=config.shard)
    told = partial(print, flush=True) if not quiet else lambda _: None
    plan = make_plan(kind, config, device, world, told)
    if not quiet:
        print(plan.text(), flush=True)
    return plan


def _known(root: Path, config: Training) -> dict[str, Any]:
    """What a run that goes on decided when it began; ValueError where its configuration was another."""
    path = root / "run.json"
    if not path.exists():
        return {}
    known = updated(type(config)(), read_toml((root / "config.toml").read_text(encoding="utf-8")))
    changed = differences(absolute(known), config)
    if changed:
        raise ValueError(f"config: {root} holds a run that was configured otherwise: {'; '.join(changed)}")
    return run_facts(path)
