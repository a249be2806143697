"""The judge: every finding a yes or no of its own, and in the end probabilities that mean what they say."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from t2ct.data.phantoms import LABELS
from t2ct.data.phantoms.reports.details import DETAILS, MIRRORED, right_by_kind
from t2ct.eval.metrics.factual import auc
from t2ct.files import write_files
from t2ct.models.judge import CELL, FILE, Judge
from t2ct.train.config import JudgeTraining
from t2ct.train.data.answers import known_details, labels_of
from t2ct.train.data.order import Draw, Samples, generator
from t2ct.train.data.source import Item, Source
from t2ct.train.recipe import Batch, Recipe, Shown, readable

HEAVIEST = 20.0  # weight of a case of the rarest finding
UNKNOWN = 2  # in a cell, of a volume of which nobody knows where the findings are
HEAVIEST_CELL = 30.0  # weight of a cell of what has the fewest
PRIOR = 1.0  # of the calibration: how much evidence it takes to leave what training alone would give


class Cases:
    """Prepares a sample: hu (1, X, Y, Z) float32, changed a little; labels (18,) float32; where asked for, details
    (len(DETAILS),) float32, NaN where unknown, and found (18, X/4, Y/4, Z/4) uint8, `UNKNOWN` if nobody knows."""

    def __init__(self, source: Source, config: JudgeTraining):
        self.entries, self.config = source.entries, config

    def __call__(self, item: Item, draw: Draw) -> Batch:
        c, rng = self.config, generator(self.config.seed, draw[1])
        u = torch.rand(3, generator=rng).tolist()
        hu, entry = torch.from_numpy(item.hu).float(), self.entries[draw[0]]
        made = {"labels": labels_of(entry)}
        found = places_of(item) if c.place_weight else None
        mirrored = c.flip and u[0] < 0.5
        if c.model.details:  # else no report need be read
            told = known_details(entry)
            made["details"] = told[MIRRORED] if mirrored else told
        if mirrored:
            hu, found = hu.flip(0), None if found is None else found.flip(0)
        hu = hu + c.shift_hu * (2 * u[1] - 1)
        if c.noise_hu:
            hu = hu + c.noise_hu * u[2] * torch.randn(hu.shape, generator=rng)
        if c.move:
            by = torch.randint(-(c.move // 2), c.move // 2 + 1, (3,), generator=rng).tolist()
            hu = moved(hu, [2 * n for n in by])  # even, so that the map of findings moves with it
            found = None if found is None else moved(found, by)
        if found is not None:
            made["found"] = cells_of(found) if item.findings is not None else cells_of(found) + UNKNOWN
        return made | {"hu": hu[None]}


def moved(x: Tensor, by: list[int]) -> Tensor:
    """x (X, Y, Z) moved by so many voxels; the border's voxels come again."""
    for axis, n in enumerate(by):
        places = (torch.arange(x.shape[axis]) + n).clamp(0, x.shape[axis] - 1)
        x = x.index_select(axis, places)
    return x


def places_of(item: Item) -> Tensor:
    """(X/2, Y/2, Z/2) int32, `Item.findings`, or zeros where nobody knows."""
    if item.findings is None:
        return torch.zeros([n // 2 for n in item.hu.shape], dtype=torch.int32)
    return torch.from_numpy(item.findings.astype(np.int32))


def cells_of(bits: Tensor) -> Tensor:
    """bits (X/2, Y/2, Z/2) int32, as `Item.findings` -> (18, X/4, Y/4, Z/4) uint8: 1 where some of a finding is."""
    each = bits[None] >> torch.arange(len(LABELS), dtype=torch.int32)[:, None, None, None] & 1
    return F.max_pool3d(each.float(), 2).to(torch.uint8)


class JudgeRecipe(Recipe):
    """parts: "judge". The overlap of places is that of a micro-batch: see `overlap_loss`."""

    config: JudgeTraining
    better = 1
    shown = ("where",)

    def __init__(
        self, config: JudgeTraining, model: Judge, source: Source | None, valid: Source | None = None,
        bad: Path | None = None,
    ):  # fmt: skip
        if config.model.classes != len(LABELS):
            raise ValueError(f"model.classes: wanted {len(LABELS)}, the labels of CT-RATE, got {config.model.classes}")
        if config.model.details not in ((), DETAILS):
            wanted = "none, or those of t2ct.data.phantoms.reports.details"
            raise ValueError(f"model.details: wanted {wanted}, got {config.model.details}")
        self.config, self.model, self.source, self.valid, self.bad = config, model, source, valid, bad
        self.weight = torch.ones(len(LABELS))
        if source is not None:
            share = torch.stack([labels_of(entry) for entry in source.entries]).mean(0)
            self.weight = class_weights(share, config.balance)
            missing = [name for name, s in zip(LABELS, share, strict=True) if s in (0, 1)]
            if missing:
                told = f"all volumes to train on have them, or none has: {', '.join(missing)}"
                warnings.warn(f"nothing to learn of {len(missing)} findings: {told}", stacklevel=2)
        self.parts: dict[str, nn.Module] = {"judge": model}

    def samples(self) -> Samples:
        assert self.source is not None
        return Samples(self.source, Cases(self.source, self.config), self.config.skip_bad, self.bad)

    def loss(self, part: str, batch: Batch) -> tuple[Tensor, Shown]:
        evidence, features = self.model.look(batch["hu"])
        raw = self.model.head(features).float()
        weight = self.weight.to(raw.device)
        loss = F.binary_cross_entropy_with_logits(raw, batch["labels"], pos_weight=weight)
        if self.config.model.details and self.config.detail_weight:
            said, told = self.model.details(features).float(), batch["details"]
            known = told.isfinite()
            each = F.binary_cross_entropy_with_logits(said, told.nan_to_num(), reduction="none")
            loss = loss + self.config.detail_weight * (each * known).sum() / known.sum().clamp_min(1)
        if not self.config.place_weight:
            return loss, {}
        where = overlap_loss(evidence, batch["found"])
        return loss + self.config.place_weight * where, {"where": where.item()}

    def validate(self, weights: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """AUC, mean over the findings that some volumes have and some lack, then of each; shares of details found."""
        raw, labels, said, told = self._seen(weights)
        areas = {name: auc(raw[:, k], labels[:, k]) for k, name in enumerate(LABELS)} if len(raw) else {}
        known = [a for a in areas.values() if a == a]
        if not known:
            return {}
        shown = {"auc_macro": sum(known) / len(known)} | {f"auc_{short(name)}": a for name, a in areas.items()}
        if self.config.model.details:
            shares = right_by_kind(said, told).items()
            shown |= {f"right_{kind}": hits.sum() / cases.sum() for kind, (hits, cases) in shares if cases.sum()}
        return shown

    def _seen(self, weights: nn.Module) -> list[np.ndarray]:
        """Of the validation split: raw logits and labels, (N, 18) each; logits and truth of details, (N, D) each."""
        rows: list[list[Tensor]] = []
        judge: Any = weights
        device = next(judge.parameters()).device
        if self.valid is not None:
            for i, item in readable(self.valid, self.config.valid_count, self.config.skip_bad):
                hu = torch.from_numpy(item.hu).float().to(device)[None, None]
                features = judge.features(hu)
                entry, said = self.valid.entries[i], (judge.head(features)[0], judge.details(features)[0])
                seen = [logits.float().cpu() for logits in said]
                rows.append([seen[0], labels_of(entry), seen[1], known_details(entry)])
        if not rows:
            return [np.zeros((0, n)) for n in (len(LABELS), len(LABELS), len(DETAILS), len(DETAILS))]
        return [torch.stack(column).numpy() for column in zip(*rows, strict=True)]

    def export(self, folder: Path, weights: nn.Module) -> None:
        """judge.safetensors with the configuration inside, calibrated, and the configuration as config.json."""
        raw, labels, *_ = self._seen(weights)
        scale, shift = calibrate(torch.from_numpy(raw), torch.from_numpy(labels), self.weight)
        state = {k: v.detach().float().cpu() for k, v in weights.state_dict().items()}
        state |= {"scale": scale, "shift": shift}
        dtype, told = getattr(torch, self.config.export), self.config.model.to_json()
        folder.mkdir(parents=True, exist_ok=True)
        kept = {k: v.to(dtype).contiguous() for k, v in state.items()}
        write_files({folder / FILE: save(kept, {"config": told}), folder / "config.json": told.encode()})

    def example(self, device: torch.device, batch: int, depth: float = 1.0, width: float = 1.0) -> Batch:
        # Whatever the grid, the network brings it to its own size: there is no smaller sample to measure.
        hu = torch.randint(-1000, 1000, (batch, 1, *self.config.model.size)).float()
        labels, told = (torch.randint(2, (batch, n)).float().to(device) for n in (len(LABELS), len(DETAILS)))
        cells = torch.randint(2, (batch, len(LABELS), *(n // CELL for n in self.config.model.size)), dtype=torch.uint8)
        return {"hu": hu.to(device), "labels": labels, "details": told, "found": cells.to(device)}


def overlap_loss(evidence: Tensor, found: Tensor) -> Tensor:
    """How far the evidence is from where the findings are: weighted cross entropy, and what lacks to a Dice overlap
    of 1 over the batch, of the findings in it (Milletari et al. 2016).

    evidence: (B, classes, x, y, z) float32 log odds. found: likewise, uint8, 0 or 1; a volume whose cells are `UNKNOWN`
    counts for nothing. A finding's cells weigh by the root of how rare they are; the overlap keeps few cells from
    drowning in the many, and is that of what is seen at once: micro-batches, unlike elsewhere, change it a little."""
    known = (found[:, :1, :1, :1, :1] < UNKNOWN).float()
    volumes = known.sum().clamp_min(1)
    found, odds = found.float() * known, evidence.sigmoid() * known
    share = found.sum((0, 2, 3, 4), keepdim=True) / (volumes * found[0, 0].numel())
    weight = share.clamp_min(1e-5).rsqrt().clamp(max=HEAVIEST_CELL)
    entropy = F.binary_cross_entropy_with_logits(evidence, found, pos_weight=weight, reduction="none") * known
    both, all_of = (odds * found).sum((0, 2, 3, 4)), (odds.square() + found).sum((0, 2, 3, 4))
    there = found.amax((0, 2, 3, 4))
    lacking = ((1 - (2 * both + 1) / (all_of + 1)) * there).sum() / there.sum().clamp_min(1)
    return entropy.sum() / (volumes * found[0].numel()) + lacking


def short(name: str) -> str:
    """ "Lung nodule" -> "lung_nodule"."""
    return name.lower().replace(" ", "_")


def class_weights(share: Tensor, balance: float) -> Tensor:
    """The weight of a case of each finding, from the share of volumes that have it; between 1/20 and 20."""
    odds = (1 - share).clamp_min(1e-6) / share.clamp_min(1e-6)
    return (odds**balance).clamp(1 / HEAVIEST, HEAVIEST)


def calibrate(raw: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift), (classes,) each, with which scale * raw + shift has the smallest cross entropy (Platt 1999).

    raw, labels: (N, classes). weight: the weight that each finding's cases had in training, which moved its logits by
    its logarithm; that undone is where the search begins, and where a finding stays of which N volumes say little.
    """
    start = -weight.double().log()
    log_scale, shift = torch.zeros_like(start), start.clone()
    x, y = raw.double(), labels.double()
    if len(x):
        with torch.enable_grad():
            unknown = [log_scale.requires_grad_(), shift.requires_grad_()]
            search = torch.optim.LBFGS(unknown, max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

            def loss() -> Tensor:
                search.zero_grad()
                entropy = F.binary_cross_entropy_with_logits(x * log_scale.exp() + shift, y, reduction="sum")
                far = PRIOR / 2 * (log_scale.square().sum() + (shift - start).square().sum())
                (entropy + far).backward()
                return entropy + far

            step: Callable[..., object] = search.step
            step(loss)
    return log_scale.detach().exp().float(), shift.detach().float()
