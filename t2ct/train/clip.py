"""CLIP3D: symmetric InfoNCE of volumes and reports, over batches larger than a device holds.

A batch cut into micro-batches has its embeddings computed first, without a gradient; the loss of the whole batch gives
each embedding's gradient; then each micro-batch is computed again, with the same random numbers, and passes its part
on (Gao et al. 2021, gradient caching). The result is the gradient of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2ct.data.phantoms import LABELS
from t2ct.data.phantoms.reports.details import right_by_kind
from t2ct.eval.metrics.factual import auc
from t2ct.models import CLIP3D
from t2ct.text import Tokenizer
from t2ct.train.config import CLIPTraining
from t2ct.train.data.answers import QUESTIONS, answers_of, question_weights, sentences
from t2ct.train.data.order import Draw, Samples, generator
from t2ct.train.data.recombined import Sentences
from t2ct.train.data.source import Item, Source
from t2ct.train.parts.codebook import SteadyQuantizer
from t2ct.train.parts.folders import export_folder
from t2ct.train.parts.tokens import token_ids
from t2ct.train.recipe import Batch, Recipe, Shown, gather, last_only, ranks, readable
from t2ct.train.show.figures import recall

LONGEST_SCALE = math.log(100)
LATER = 0.6  # of the share of recombined texts, what is whole reports at the end of a run
FIRST, LAST = 3, 6  # sentences of a recombined text, at most: few leave nothing to count, many are like a report
SENTENCE = 32  # tokens of a sentence about a finding, at most, to measure memory by


def answer_loss(
    embedding: Tensor, yes: Tensor, no: Tensor, answers: Tensor, scale: Tensor, weights: Tensor | float = 1.0
) -> Tensor:
    """Mean cross entropy of embeddings (B, E) that lie nearer to sentences that say yes (Q, E), or no (Q, E).

    answers: (B, Q) 1, 0, or NaN where nothing is known, which counts as answered without loss. weights: (Q,)."""
    logits = scale * embedding @ (yes - no).T
    known = answers.isfinite()
    each = F.binary_cross_entropy_with_logits(logits, answers.nan_to_num(), reduction="none")
    return (each * known * weights).mean()


def info_nce(text: Tensor, volume: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross entropy over the batch; text and volume (B, E), L2-normalised; row i belongs to row i."""
    logits = scale * text @ volume.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Reports:
    """Prepares a sample: the volume in HU, the token ids of one of its reports, to its own length; with a label_weight
    the answers (QUESTIONS,); with `recombine` often a text of several reports' sentences, and its mirror image next."""

    def __init__(self, source: Source, tokenizer: Tokenizer, config: CLIPTraining):
        self.entries, self.tokenizer, self.config = source.entries, tokenizer, config
        self.sentences = Sentences(source.entries) if config.recombine else None

    def __call__(self, item: Item, draw: Draw) -> Batch:
        c, number = self.config, draw[1]
        if self.sentences is not None:
            pair = number // 2  # twins of one text, unlike it in its sides alone
            rng, progress = generator(c.seed + 2, pair), 2 * pair / (c.steps * c.batch)
            if torch.rand((), generator=rng) < c.recombine * (1 - LATER * progress):
                text, answers = self.sentences.draw(rng, FIRST + round((LAST - FIRST) * progress), number % 2 == 1)
                return {"ids": token_ids(self.tokenizer, [text], c.model.clip.text.max_length)[0], "answers": answers}
        texts, rng = self.entries[draw[0]].texts, generator(self.config.seed, draw[1])
        text = texts[int(torch.randint(len(texts), (1,), generator=rng))]
        ids = token_ids(self.tokenizer, [text], self.config.model.clip.text.max_length)[0]
        made = {"volume": torch.from_numpy(item.hu)[None], "ids": ids} if self.config.contrast_weight else {"ids": ids}
        return made | {"answers": answers_of(self.entries[draw[0]])} if self.config.label_weight else made


class CLIPRecipe(Recipe):
    """parts: "clip"."""

    config: CLIPTraining
    shown: tuple[str, ...] = ("hit", "scale")
    better = 1
    wide = True  # the projection takes the tokens of a whole cross-section

    def __init__(
        self, config: CLIPTraining, model: CLIP3D, tokenizer: Tokenizer | None, source: Source | None,
        valid: Source | None = None, bad: Path | None = None,
    ):  # fmt: skip
        if source is not None and config.batch > len(source):
            raise ValueError(f"batch: wanted at most the {len(source)} volumes of the data, got {config.batch}")
        self.config, self.model, self.tokenizer, self.source, self.valid = config, model, tokenizer, source, valid
        self.bad = bad
        self.questions: Tensor | None = None
        self.weights = question_weights()
        if config.label_weight:
            text = config.model.clip.text
            self.questions = torch.zeros(2 * QUESTIONS, min(SENTENCE, text.max_length), dtype=torch.long)
            self.questions[:, -1] = text.eot_id
            if tokenizer is not None:
                yes, no = sentences()
                self.questions = token_ids(tokenizer, (*yes, *no), text.max_length)
        tower: Any = model.model.vision_model
        if not isinstance(tower.vq, SteadyQuantizer):
            tower.vq = SteadyQuantizer(tower.vq, config.codebook_decay, config.dead_share, config.batch)
        self.quantizer: SteadyQuantizer = tower.vq
        if not config.contrast_weight:
            self.shown = ("scale",)
        frozen = ["vision_model", "visual_projection"] if not config.contrast_weight else []
        frozen += ["text_model", "text_projection"] if config.freeze_text else []
        for name in frozen:
            getattr(model.model, name).requires_grad_(False)
        self.parts: dict[str, nn.Module] = {"clip": model}

    def samples(self) -> Samples:
        assert self.source is not None and self.tokenizer is not None
        return Samples(self.source, Reports(self.source, self.tokenizer, self.config), self.config.skip_bad, self.bad)

    @torch.no_grad()
    def begin(self, step: int) -> None:
        self.model.logit_scale.clamp_(0, LONGEST_SCALE)
        self.quantizer.forget()

    def loss(self, part: str, batch: Batch) -> Any:
        """Embeddings of a micro-batch, (B, E) each, in float32: InfoNCE wants all of them; and the loss of its answers,
        a mean over its samples. Without a contrast that of the reports' answers alone, and what is shown."""
        if not self.config.contrast_weight:
            text = self.model.encode_text(batch["ids"])[:, 0].float()
            scale = self.model.logit_scale.exp()
            return self.config.label_weight * self._asked((text,), batch["answers"], scale), {"scale": scale.item()}
        text, volume, scale = self.model(batch["ids"], batch["volume"].float())
        # A copy, no view: fully_shard's hook for the gradient hangs on what is handed out.
        text, volume, asked = text.float().clone(), volume.float(), torch.zeros((), device=text.device)
        if self.config.label_weight and torch.is_grad_enabled():
            asked = self._asked((text, volume), batch["answers"], scale)
        return text, volume, asked

    def _asked(self, embeddings: Sequence[Tensor], answers: Tensor, scale: Tensor) -> Tensor:
        assert self.questions is not None
        # kept there: a copy from the host at every micro-batch would make a GPU wait
        self.questions, self.weights = (t.to(answers.device) for t in (self.questions, self.weights))
        yes, no = self.model.encode_text(self.questions)[:, 0].float().chunk(2)
        losses = [answer_loss(e, yes, no, answers, scale, self.weights) for e in embeddings]
        return torch.stack(losses).mean()

    def gradients(
        self, part: str, call: nn.Module, micros: Sequence[Batch], backward: Callable[[Tensor], None], autocast: Any
    ) -> tuple[Tensor, Shown]:
        if not self.config.contrast_weight:
            return super().gradients(part, call, micros, backward, autocast)
        cached = len(micros) > 1 or ranks()[1] > 1
        if self.quantizer._codebook.initted == 0:
            self._first_codes(part, call, micros, autocast)
        seed = torch.initial_seed()  # the update's
        if cached:
            made = []
            with torch.no_grad(), autocast():
                for i, batch in enumerate(micros):
                    torch.manual_seed(seed + i)
                    made.append(call(part, batch))
        else:
            with autocast():
                self.quantizer.counting = True
                made = [call(part, micros[0])]
                self.quantizer.counting = False
        texts, volumes = (torch.cat([part[i] for part in made]) for i in (0, 1))
        own = len(texts)
        if cached:
            texts, volumes = texts.requires_grad_(), volumes.requires_grad_()
        rank, world = ranks()
        every = [gather(t.detach()) if world > 1 else t for t in (texts, volumes)]
        if world > 1:  # this rank's rows with their gradient among the others'
            at = rank * own
            every = [torch.cat((e[:at], t, e[at + own :])) for e, t in zip(every, (texts, volumes), strict=True)]
        scale = self.model.logit_scale.exp() if not cached else self.model.logit_scale.detach().exp().requires_grad_()
        loss = self.config.contrast_weight * info_nce(every[0], every[1], scale)
        if cached:
            gradients = torch.autograd.grad(loss, (texts, volumes, scale))
            loss = loss + self._pass_on(call, part, micros, gradients, backward, autocast, seed)
        else:
            loss = loss + self.config.label_weight * made[0][2]
            backward(loss)
        hit = ((every[0] @ every[1].T).argmax(1) == torch.arange(len(every[0]), device=loss.device)).float().mean()
        return loss.detach().float().cpu(), {"hit": hit.item(), "scale": scale.item()}

    def _pass_on(self, call, part, micros, gradients, backward, autocast, seed) -> Tensor:
        """Compute every micro-batch again, with the same random numbers, and hand the embeddings' gradients through;
        returns the weighted loss of the answers, which each micro-batch has for itself."""
        _, world = ranks()
        texts, volumes, scale = gradients
        start, total = 0, torch.zeros(())
        self.quantizer.counting = True
        for i, batch in enumerate(micros):
            rows = slice(start, start := start + len(batch["ids"]))
            torch.manual_seed(seed + i)
            with last_only(call, i, len(micros)):
                with autocast():
                    text, volume, asked = call(part, batch)
                # Ranks average their gradients; of rows they have a share each, of the scale all of them the whole.
                through = world * ((text * texts[rows]).sum() + (volume * volumes[rows]).sum())
                # exp's own derivative; each micro-batch brings its share
                own = self.model.logit_scale
                through = through + own * (scale * own.detach().exp()) / len(micros)
                asked = self.config.label_weight * asked / len(micros)
                total = total + asked.detach().cpu()
                backward(through + asked)
        self.quantizer.counting = False
        return total.to(scale.device)

    def _first_codes(self, part: str, call: nn.Module, micros: Sequence[Batch], autocast: Any) -> None:
        """Codes begin as tokens of the first batch. Through `call`, though its texts go unused: outside it a shared
        network has no whole weights."""
        self.quantizer.forget()
        self.quantizer.counting = True
        with torch.no_grad(), autocast():
            for batch in micros:
                call(part, batch)
        self.quantizer.counting = False
        self.quantizer.move(0)

    def after(self, step: int) -> None:
        if self.config.contrast_weight:
            self.quantizer.move(step + 1)

    def validate(self, weights: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """R@1, R@5 and R@10 of reports for volumes and of volumes for reports; with a label_weight the share of sides
        that the sentences answer rightly, and the mean AUC of the findings' sentences, of reports and of volumes."""
        if self.valid is None or not len(self.valid) or self.tokenizer is None:
            return {}
        device = next(weights.parameters()).device
        texts, volumes, answers = [], [], []
        for i, item in readable(self.valid, self.config.valid_count, self.config.skip_bad):
            ids = token_ids(self.tokenizer, self.valid.entries[i].texts[:1], self.config.model.clip.text.max_length)
            texts.append(weights.encode_text(ids.to(device))[:, 0])  # type: ignore[operator]
            if self.config.contrast_weight:
                hu = torch.from_numpy(item.hu)[None, None].to(device)
                volumes.append(weights.encode_volume(hu.float()))  # type: ignore[operator]
            if self.questions is not None:
                answers.append(answers_of(self.valid.entries[i]))
        if not texts:
            return {}
        shown: dict[str, float] = {}
        if volumes:
            found = recall(torch.cat(texts).float(), torch.cat(volumes).float())
            shown = {"mean_recall": sum(found.values()) / len(found)} | found
        if self.questions is not None:
            yes, no = weights.encode_text(self.questions.to(device))[:, 0].float().chunk(2)  # type: ignore[operator]
            truth, n = torch.stack(answers).numpy(), len(LABELS)
            for name, auc_name, of in (("reports", "auc_of_reports", texts), ("volumes", "zero_shot_auc", volumes)):
                if not of:
                    continue
                scores = (torch.cat(of).float() @ (yes - no).T).cpu().numpy()
                right, told = (found.sum() for found in right_by_kind(scores[:, n:], truth[:, n:])["side"])
                if told:
                    shown[f"sides_of_{name}"] = float(right / told)
                known = [a for k in range(n) if (a := auc(scores[:, k], truth[:, k])) == a]
                shown[auc_name] = sum(known) / max(1, len(known))
        return shown

    def export(self, folder: Path, weights: nn.Module) -> None:
        export_folder(folder, self.config, clip=weights, tokenizer=self.tokenizer)

    def example(self, device: torch.device, batch: int, depth: float = 1.0, width: float = 1.0) -> Batch:
        vision, text = self.config.model.clip.vision, self.config.model.clip.text
        x, _, z = self.config.model.size
        slabs = max(1, round(z * depth / vision.temporal_patch_size))
        volume = torch.randint(-1000, 1000, (batch, 1, x, x, slabs * vision.temporal_patch_size), dtype=torch.int16)
        ids = torch.randint(0, text.eot_id, (batch, text.max_length))
        ids[:, -1] = text.eot_id
        made = {"volume": volume, "ids": ids} if self.config.contrast_weight else {"ids": ids}
        if self.config.label_weight:
            made["answers"] = torch.randint(2, (batch, QUESTIONS)).float()
        return {name: value.to(device) for name, value in made.items()}


@torch.inference_mode()
def embed_texts(model: CLIP3D, ids: Tensor, batch: int = 256) -> Tensor:
    """(N, L) ids -> (N, embed_dim), a batch at a time."""
    return torch.cat([model.encode_text(part)[:, 0] for part in ids.split(batch)]).clone()
