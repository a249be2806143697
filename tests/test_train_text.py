"""What networks learn of texts: sentences whose answers are known, and contexts as wide in every direction."""

from dataclasses import replace
from functools import partial
from zlib import crc32

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import SMALL
from test_train_recipes import Latents, Volumes, Words, ldm_recipe, learned, steps_of

from t2ct.data.phantoms import LABELS
from t2ct.data.phantoms.reports.details import DETAILS
from t2ct.models import CLIP3D
from t2ct.train import train
from t2ct.train.clip import CLIPRecipe, answer_loss, info_nce
from t2ct.train.config import CLIPTraining, LDMTraining
from t2ct.train.data.answers import QUESTIONS, answers_of, question_weights, sentences
from t2ct.train.data.source import Entry, Unread
from t2ct.train.parts.whitening import context_layers, folded, multiply, whitening
from t2ct.train.presets import TINY
from t2ct.train.run import configure

NO_AUTOCAST = partial(torch.autocast, "cpu", enabled=False)


def entry(i):
    labels = tuple(int(k % 8 == i) for k in range(len(LABELS)))
    return Entry(str(i), (f"large effusion {i}",), labels, (float("nan"),) * len(DETAILS))


class Labelled(Volumes):
    """Volumes whose labels are known and whose details are not."""

    entries = [entry(i) for i in range(8)]


def test_the_loss_of_answers_is_its_formula():
    g = torch.Generator().manual_seed(0)
    e, yes, no = (F.normalize(torch.randn(n, 5, generator=g).double(), dim=-1) for n in (3, 4, 4))
    answers = torch.tensor([[1, 0, float("nan"), 1], [0, 0, 1, float("nan")], [float("nan")] * 4]).double()
    scale, wanted = 7.0, 0.0
    for b in range(3):
        for q in range(4):
            p = 1 / (1 + np.exp(-scale * (e[b] @ (yes[q] - no[q])).item()))
            wanted -= {1.0: np.log(p), 0.0: np.log(1 - p)}.get(answers[b, q].item(), 0.0) / 12
    assert answer_loss(e, yes, no, answers, torch.tensor(scale)).item() == pytest.approx(wanted, rel=1e-6)


def test_every_question_has_a_sentence_of_its_own():
    yes, no = sentences()
    assert len(yes) == len(no) == QUESTIONS == len(set(yes))
    assert yes[LABELS.index("Lung nodule")] == "Lung nodule is present."
    at = len(LABELS) + DETAILS.index("pleural effusion: side right")
    assert yes[at] == "Right pleural effusion is present." and no[at] == "Right pleural effusion is not present."
    assert yes[len(LABELS) + DETAILS.index("lung nodule: lobe upper")] == "Lung nodule of the upper lobe is present."
    answers = answers_of(Labelled.entries[3])
    assert answers[: len(LABELS)].sum() == sum(k % 8 == 3 for k in range(len(LABELS)))
    assert answers[len(LABELS) :].isnan().all()


class OfWords(Words):
    """A token for every word, however long."""

    def encode(self, texts, length):
        def letter(word):
            return chr(crc32(word.encode()) % 200)

        return super().encode(["".join(map(letter, text.split())) for text in texts], length)


def labelled(micro_count, **values):
    torch.manual_seed(0)
    config = CLIPTraining(model=SMALL, steps=20, batch=8, **{"label_weight": 0.5, **values})
    recipe = CLIPRecipe(config, CLIP3D(SMALL.clip).train(), OfWords(), Labelled(), Labelled())
    batch = steps_of(recipe, recipe.samples(), "clip")[0]
    size = 8 // micro_count
    return recipe, [{k: v[i * size : (i + 1) * size] for k, v in batch.items()} for i in range(micro_count)]


def test_answers_are_added_to_the_contrast_whole_and_through_a_cache():
    found = {}
    for count in (1, 4):
        recipe, micros = labelled(count)
        recipe.begin(0)
        loss, _ = recipe.gradients("clip", recipe.loss, micros, lambda x: x.backward(), NO_AUTOCAST)
        found[count] = loss, {k: p.grad for k, p in recipe.model.named_parameters() if p.grad is not None}
    recipe, (batch,) = labelled(1)
    recipe.begin(0)
    recipe._first_codes("clip", recipe.loss, [batch], NO_AUTOCAST)
    text, volume, _ = recipe.loss("clip", batch)
    scale = recipe.model.logit_scale.exp()
    yes, no = recipe.model.encode_text(recipe.questions)[:, 0].chunk(2)
    asked = [answer_loss(e, yes, no, batch["answers"], scale, question_weights()) for e in (text, volume)]
    whole = info_nce(text, volume, scale) + 0.5 * sum(asked) / 2
    whole.backward()
    plain = {k: p.grad for k, p in recipe.model.named_parameters() if p.grad is not None}
    largest = max(g.abs().max() for g in plain.values())
    for loss, grads in found.values():
        assert torch.allclose(loss, whole, atol=1e-5)
        assert grads.keys() == plain.keys()
        for key in plain:
            assert (grads[key] - plain[key]).abs().max() <= 1e-5 * largest, key


@torch.no_grad()
def seen(recipe):
    return recipe.validate(recipe.model.eval(), None, 0)


def test_answers_are_learnt_and_looked_at():
    recipe, _ = labelled(1)
    before = seen(recipe)
    recipe.model.train()
    learned(recipe, "clip", steps=120)
    after = seen(recipe)
    assert after["auc_of_reports"] > max(0.9, before["auc_of_reports"])
    assert "zero_shot_auc" in after
    plain = CLIPRecipe(replace(recipe.config, label_weight=0.0), recipe.model, OfWords(), Volumes(), Volumes())
    assert "zero_shot_auc" not in seen(plain)


def moved(recipe, steps):
    """Which of the network's parts a few updates change."""
    before = {k: v.detach().clone() for k, v in recipe.model.named_parameters()}
    recipe.model.train()
    losses = learned(recipe, "clip", steps=steps)
    assert losses[-1] < losses[0]
    return {k.split(".")[1] for k, v in recipe.model.named_parameters() if not torch.equal(v, before[k])}


def test_reports_learn_from_answers_alone_then_volumes_meet_them():
    recipe, (batch,) = labelled(1, contrast_weight=0.0)
    assert set(batch) == {"ids", "answers"} and recipe.example(torch.device("cpu"), 2).keys() == batch.keys()
    assert moved(recipe, 60) == {"text_model", "text_projection", "logit_scale"}
    figures = seen(recipe)
    assert set(figures) == {"auc_of_reports"}  # no report here tells a side
    later = CLIPRecipe(
        replace(recipe.config, contrast_weight=1.0, freeze_text=True), recipe.model.requires_grad_(True), OfWords(),
        Labelled(), Labelled(),
    )  # fmt: skip
    assert moved(later, 20) == {"vision_model", "visual_projection", "logit_scale"}
    assert seen(later)["auc_of_reports"] == figures["auc_of_reports"]


def test_what_would_learn_nothing_is_refused():
    with pytest.raises(ValueError, match="contrast_weight: wanted more than 0, or a label_weight"):
        CLIPTraining(contrast_weight=0.0)
    with pytest.raises(ValueError, match="freeze_text: wanted a contrast_weight above 0"):
        CLIPTraining(contrast_weight=0.0, label_weight=1.0, freeze_text=True)


def test_data_that_cannot_teach_are_refused_at_once(tmp_path):
    (tmp_path / "manifest.csv").write_text("volume,report\na.nii.gz,Large effusion.\n")
    (tmp_path / "a.nii.gz").write_bytes(b"")
    for kind, way in (("ldm", "--set clip=RUN takes"), ("clip", "--set label_weight=0 does without")):
        with pytest.raises(ValueError, match=f"no labels.*CLIP3D of the preset embedded learns from labels: {way}"):
            train(kind, str(tmp_path), tmp_path / "run", preset="embedded", quiet=True, device="cpu")
    with pytest.raises(ValueError, match="freeze_text: wanted start=, the run whose reports"):
        train("clip", "phantoms:8", tmp_path / "other", preset="tiny", freeze_text=True, quiet=True, device="cpu")
    with pytest.raises(ValueError, match="label_weight: wanted a finite number of at least 0, got -1"):
        CLIPTraining(label_weight=-1.0)


def test_reports_alone_read_no_volume(tmp_path):
    class Broken(Labelled):
        def read(self, index):
            raise AssertionError("a volume was read")

    source = Unread(Broken())
    assert len(source) == 8 and source.entries is Broken.entries
    config = CLIPTraining(model=SMALL, steps=2, batch=8, contrast_weight=0.0, label_weight=1.0)
    recipe = CLIPRecipe(config, CLIP3D(SMALL.clip).train(), OfWords(), source, source)
    assert set(steps_of(recipe, recipe.samples(), "clip")[0]) == {"ids", "answers"} and "auc_of_reports" in seen(recipe)
    from t2ct.train.build import build

    made = build("clip", replace(config, model=TINY), "phantoms:64", tmp_path, torch.device("cpu"), tmp_path / "cache")
    assert isinstance(made.source, Unread) and isinstance(made.valid, Unread) and not (tmp_path / "cache").exists()


def test_adapters_of_a_preset_that_whitens():
    assert configure("ldm", "embedded").whiten and not configure("ldm", "embedded", lora=4).whiten
    with pytest.raises(ValueError, match="whiten: wanted false beside lora"):
        configure("ldm", "embedded", lora=4, whiten=True)


def test_whitened_contexts_are_as_wide_in_every_direction():
    g = torch.Generator().manual_seed(0)
    spread = torch.diag(torch.logspace(0, -1, 6))
    contexts = F.normalize(torch.randn(4000, 6, generator=g) @ spread + 3 * torch.eye(6)[0], dim=-1)
    white = contexts @ whitening(contexts)
    moments = torch.linalg.eigvalsh(white.T @ white / len(white))
    assert torch.linalg.cond(contexts.T @ contexts) > 500
    assert moments.max() < 1.001 and moments.min() > 0.5
    flat = torch.cat((contexts, torch.zeros(4000, 1)), 1)  # where nothing goes, nothing is blown up
    assert (flat @ whitening(flat)).abs().max() < 30


def test_a_network_that_learnt_from_white_contexts_takes_them_as_they_are():
    recipe = ldm_recipe(latents="means", whiten=True)
    learned(recipe, "unet", steps=5, rate=5e-3)
    model, batch = recipe.model.eval(), steps_of(recipe, recipe.samples(), "unet")[0]
    raw = torch.cat(recipe.contexts)[:4, None]
    label, times = torch.full((4,), SMALL.class_label), batch["t"] * 1000

    def answer(context):
        with torch.no_grad():
            return model(batch["x0"], times, context, label, batch["spacing"])

    wanted, weights = answer(raw @ recipe.white), {k: v.clone() for k, v in model.state_dict().items()}
    assert not torch.allclose(answer(raw), wanted, atol=1e-3)
    with folded(model, recipe.white):
        assert torch.allclose(answer(raw), wanted, atol=1e-4)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    with folded(model, None):
        assert torch.equal(answer(raw @ recipe.white), wanted)
    multiply(model, recipe.white)
    multiply(model, torch.linalg.inv(recipe.white.double()))
    assert all(torch.allclose(m.weight, weights[k], atol=1e-3) for k, m in named(model))


def named(model):
    layers = {id(m) for m in context_layers(model)}
    return [(f"{name}.weight", m) for name, m in model.named_modules() if id(m) in layers]


def test_what_is_exported_has_the_whitening_inside(tmp_path):
    recipe = ldm_recipe(latents="means", whiten=True)
    recipe.tokenizer = None  # the words of this test are no tokenizer's
    recipe.export(tmp_path, recipe.model)
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "unet.safetensors")
    for name, layer in named(recipe.model):
        assert torch.allclose(kept[name], layer.weight @ recipe.white, atol=1e-5)
    with pytest.raises(ValueError, match="whiten: wanted false beside lora"):
        LDMTraining(model=SMALL, whiten=True, lora=2)
    assert ldm_recipe(Latents()).white is None
