"""What the processes of tests/test_train_shard.py run: updates of small networks, alone or as one of two over gloo."""

import multiprocessing
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import micro
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # here, and not in every child again
from safetensors.torch import save_file
from small import SMALL

from t2ct.models import UNet
from t2ct.models.judge import JudgeConfig
from t2ct.train.config import CLIPTraining, JudgeTraining, LDMTraining, VAETraining
from t2ct.train.ldm import LDMRecipe
from t2ct.train.loop import Run, run
from t2ct.train.memory import checkpoint_blocks
from t2ct.train.memory.recipes import probe_recipe
from t2ct.train.parts.lora import add_lora
from t2ct.train.parts.shard import local
from t2ct.train.recipe import one_message, ranks

CPU = torch.device("cpu")
COMMON = {"steps": 4, "batch": 4, "micro": 1, "precision": "float32", "schedule": "constant", "ema": 0.5, "seed": 3}
MATRICES = {"matrix_learning_rate": 1e-3, "clip_norm": 0.01}
TINY_JUDGE = JudgeConfig(size=(16, 16, 16), channels=(8, 8, 16), norm_groups=4)
PATCHES = {"patches": ((16, 16, 16),), "patch_from": (0.0,), "critic_channels": 4, "critic_layers": 1}
CONFIGS = {
    "vae": VAETraining(**COMMON, **PATCHES, model=SMALL, critic_from=0.0, shard="all"),
    "clip": CLIPTraining(**COMMON, **MATRICES, model=SMALL, label_weight=1.0, shard="all"),
    "ldm": LDMTraining(**COMMON, **MATRICES, model=SMALL, checkpoint_blocks=True, shard="all"),
    "lora": LDMTraining(**COMMON, model=SMALL, lora=2, clip_norm=0.01, shard="all"),
    "judge": JudgeTraining(**COMMON, model=TINY_JUDGE, place_weight=0.0, shard="all"),
}


def recipe_of(name):
    config = CONFIGS[name]
    torch.manual_seed(config.seed)
    if name == "lora":
        unet = UNet(SMALL.unet)
        add_lora(unet, config.lora, config.seed)
        recipe = LDMRecipe(config, unet, None, None, None, None)
    else:
        recipe = probe_recipe(name, config, CPU)
    generator = torch.Generator().manual_seed(5)
    for part in recipe.parts.values():  # also what begins as zero, and hides what is behind it
        for p in part.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    if config.checkpoint_blocks:
        checkpoint_blocks(recipe.parts)
    return recipe


def update_twice(root, name):
    """Two updates of a network; the first rank leaves what a checkpoint holds, and what the run would show."""
    rank, world = ranks()
    recipe = recipe_of(name)
    state = Run(recipe, CONFIGS[name], CPU)
    for part in recipe.parts.values():
        part.train()
    norms = []
    for step in range(2):
        # With one in ten others a voxel's error changes its sign by rounding alone, and shows beyond 1e-6.
        torch.manual_seed(step)
        batch = recipe.example(CPU, CONFIGS[name].batch)
        told = state.update([{k: v[i : i + 1] for k, v in batch.items()} for i in range(rank, 4, world)])
        norms.append(told[1].item())
        state.step += 1
        if step == 0:
            first = {f"first.{k}": v.clone() for k, v in state.tensors().items() if k.startswith("optim.")}
    # Copies: to show it, one process puts the average in the weights' place.
    tensors = {k: v.clone() for k, v in state.tensors().items()}
    with state.shown() as weights:
        if weights is not None:
            shown = {f"shown.{k}": v.clone() for k, v in weights.state_dict().items()}
            folder = Path(root) / ("one" if world == 1 else "two")
            folder.mkdir(parents=True, exist_ok=True)
            save_file({**first, **tensors, **shown, "norms": torch.tensor(norms)}, folder / f"{name}.safetensors")


def update_all(root):
    for name in CONFIGS:
        update_twice(root, name)


def held(root):
    """What a rank holds between two updates: numbers of weights, of gradients and of moments, a file for each rank."""
    rank, _ = ranks()
    recipe = recipe_of("ldm")
    state = Run(recipe, CONFIGS["ldm"], CPU)
    torch.manual_seed(0)
    batch = recipe.example(CPU, 2)
    state.recipe.gradients("unet", state.calls["unet"], [batch], state._backward, state.autocast)
    optimiser = state.optimisers["unet"]
    grads = sum(local(p.grad).numel() for p in optimiser.live.values())
    optimiser.step(1.0)
    moments = sum(v.numel() for o in optimiser.optimisers.values() for s in o.state.values() for v in s.values())
    weights = sum(local(p).numel() for p in recipe.model.parameters())
    average = sum(v.numel() for v in state.average.weights.values())
    torch.save((weights, grads, moments, average), Path(root) / f"held-{rank}.pt")


def train_micro(folder, changes, poison=()):
    """A run of milliseconds, with its loop, to its end or to where it stops."""
    config = replace(micro.CONFIG, **changes)
    recipe = micro.MicroRecipe(config, poison)
    run(recipe, config, Path(folder), CPU, config.batch // ranks()[1] // 2, quiet=True)


def from_step(source, folder, step):
    """A run's folder that knows its checkpoint of `step` alone."""
    rank, world = ranks()
    if rank == 0:
        (Path(folder) / "checkpoints").mkdir(parents=True)
        for file in (Path(source) / "checkpoints").glob(f"step-{step:08d}.*"):
            shutil.copy(file, Path(folder) / "checkpoints")
    if world > 1:
        dist.barrier()


class Spoilt(micro.MicroRecipe):
    """At the third update the last row of a weight becomes NaN, on the rank that holds it."""

    def begin(self, step):
        super().begin(step)
        if step == 2 and ranks()[0] == 1:
            local(self.model[0].weight)[-1] = float("nan")


class Lost(micro.MicroRecipe):
    """At the third update one of the processes is gone."""

    def begin(self, step):
        super().begin(step)
        if step == 2 and ranks()[0] == 1:
            os._exit(9)


def train_lost(folder, changes):
    config = replace(micro.CONFIG, **changes)
    with one_message():
        run(Lost(config), config, Path(folder), CPU, 1, quiet=True)


def train_spoilt(folder, changes):
    config = replace(micro.CONFIG, **changes)
    run(Spoilt(config), config, Path(folder), CPU, 1, quiet=True)


def in_rank(rank, store, errors, jobs):
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the life of the process
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for job, *arguments in jobs:
            job(*arguments)
    except Exception as error:
        errors.put((rank, f"{type(error).__name__}: {error}"))
        os._exit(1)  # as torchrun ends all where one is lost
    dist.destroy_process_group()


def together(folder, *jobs):
    """Run jobs, (function, *arguments) each, as two processes; their errors, (rank, message) each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shards"])
    errors = context.SimpleQueue()
    store = Path(folder) / "store"
    children = [context.Process(target=in_rank, args=(rank, str(store), errors, jobs)) for rank in range(2)]
    for child in children:
        child.start()
    found = []
    for child in children:
        child.join(120)
        if child.is_alive():
            child.kill()
            found.append((-1, "a process waits for the other without end"))
    store.unlink(missing_ok=True)
    while not errors.empty():
        found.append(errors.get())
    lost = [child.exitcode for child in children if child.exitcode]
    return found or [(-1, f"a process ended with code {code}") for code in lost]
