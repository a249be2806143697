"""What teaches a text tower whose side is whose, and a UNet to listen to another text tower."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from test_train_recipes import SMALL, Latents, Words, ldm_recipe, steps_of
from test_train_text import OfWords

from t2ct.data.phantoms import LABELS, read_report
from t2ct.data.phantoms.reports.details import ASPECTS, MIRRORED, details_told
from t2ct.models import CLIP3D, UNet
from t2ct.train.clip import CLIPRecipe
from t2ct.train.config import CLIPTraining, LDMTraining
from t2ct.train.data import open_data
from t2ct.train.data.answers import QUESTIONS, answers_of, question_weights
from t2ct.train.data.recombined import SIDED, Sentences
from t2ct.train.ldm import LDMRecipe
from t2ct.train.parts.whitening import context_layers, fitted, kept


@pytest.fixture(scope="module")
def entries():
    return open_data("phantoms:60", "train", (32, 32, 32)).entries


def rng(seed):
    return torch.Generator().manual_seed(seed)


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)


def test_every_sentence_and_its_mirror_image_say_what_is_told_of_them():
    sentences, turned = Sentences(open_data("phantoms:400", "train", (32, 32, 32)).entries), set()
    assert set(sentences.names) == {label.lower() for label in LABELS}
    for (name, one_sided), pool in sentences.told.items():
        for pair in pool:
            for told in pair:
                reading = read_report(told.text)
                assert {f.name for f in reading.findings} == {name} and not reading.denied and told.text[-1] == "."
                assert same(details_told(told.text), told.details), told.text
            if pair[0].text != pair[1].text:
                assert same(pair[0].details[MIRRORED], pair[1].details) and name in SIDED
                turned.update(set(pair[0].text.replace(",", "").rstrip(".").split()) - set(pair[1].text.split()))
            else:
                left_alone = re.search("middle|RML|lingula", pair[0].text) or name == "medical material"
                assert not one_sided or left_alone, pair[0].text
    assert {"right", "left", "RUL", "LLL", "Right-sided", "R-sided", "L"} <= turned


def test_recombined_texts_say_what_their_answers_are(entries):
    sentences, sides = Sentences(entries), 0
    for seed in range(200):
        text, answers = sentences.draw(rng(seed), 4, False)
        reading = {f.name for f in read_report(text).findings}
        labels, said = answers[: len(LABELS)], answers[len(LABELS) :].numpy()
        asserted = {name.lower() for name, yes in zip(LABELS, labels, strict=True) if yes}
        assert asserted == reading and 1 <= len(reading) <= 4
        assert same(details_told(text), said), text
        mirror, turned = sentences.draw(rng(seed), 4, True)
        assert torch.equal(turned[: len(LABELS)], labels)
        assert same(details_told(mirror), turned[len(LABELS) :]), mirror
        sides += not same(said, turned[len(LABELS) :])
    assert sides > 80


def test_twins_lie_side_by_side_and_whole_reports_come_in_the_end():
    source = open_data("phantoms:60", "train", (32, 32, 32))
    config = CLIPTraining(model=SMALL, steps=10_000, batch=40, contrast_weight=0.0, label_weight=1.0, recombine=1.0)
    samples = CLIPRecipe(config, CLIP3D(SMALL.clip), OfWords(), source).samples()
    assert pickle.dumps(samples.prepare.sentences)
    whole = {}
    for number in (*range(40), *range(399_960, 400_000)):
        whole[number] = samples.prepare(source.entries[0], (number % 40, number, number % 40))
        assert whole[number]["answers"].shape == (QUESTIONS,)
    for number in range(0, 40, 2):
        assert torch.equal(*(whole[number + i]["answers"][: len(LABELS)] for i in (0, 1)))
    assert sum(not torch.equal(whole[n]["ids"], whole[n + 1]["ids"]) for n in range(0, 40, 2)) > 8

    def reports(numbers):  # how many are of the volume's own report
        return sum(same(whole[n]["answers"], answers_of(source.entries[n % 40])) for n in numbers)

    assert reports(range(40)) <= 2 and 14 <= reports(range(399_960, 400_000)) <= 34
    again = samples.prepare(source.entries[0], (7, 7, 7))
    assert torch.equal(again["ids"], whole[7]["ids"])


def test_recombining_wants_text_alone_and_reports_it_can_read():
    with pytest.raises(ValueError, match="recombine: wanted a finite number from 0 to 1, got 2"):
        CLIPTraining(contrast_weight=0.0, label_weight=1.0, recombine=2.0)
    with pytest.raises(ValueError, match="recombine: wanted contrast_weight 0 and a label_weight.*got 1 and 1"):
        CLIPTraining(label_weight=1.0, recombine=0.5)
    with pytest.raises(ValueError, match="recombine: wanted reports with sentences that assert one finding"):
        Sentences(open_data("phantoms:60", "train", (32, 32, 32)).entries[:0])


def test_labels_sides_and_other_details_weigh_alike():
    weights = question_weights()
    assert weights.shape == (QUESTIONS,) and weights[: len(LABELS)].sum() == pytest.approx(QUESTIONS / 4)
    sided = torch.tensor([a.kind == "side" for a in ASPECTS for _ in a.values])
    details = weights[len(LABELS) :] / 6
    assert details[sided].sum() == pytest.approx(QUESTIONS / 2)
    assert details[~sided].sum() == pytest.approx(QUESTIONS / 4)


def test_contexts_of_another_encoder_are_fitted():
    g = rng(0)
    c, a = torch.randn(500, 6, generator=g), torch.randn(6, 6, generator=g)
    assert torch.allclose(fitted(c, c @ a.T), a, atol=0.01)
    assert kept(c, c @ a.T) > 0.99 and kept(c, torch.randn(500, 6, generator=g)) < 0.05
    assert kept(c[:20, :5], torch.randn(20, 5, generator=g)) < 0.6  # few texts are fitted well, and foretell nothing
    narrow = c * torch.tensor([10.0, 1, 1, 1, 1, 0.5])
    deaf = narrow.clone()
    deaf[:, 3:] = 0  # half of the directions are lost, of all that is wide hardly any
    assert 0.4 < kept(deaf, narrow) < 0.6
    assert np.isnan(kept(c, c[:1].expand(500, 6)))


def test_a_network_given_another_encoder_answers_as_it_did():
    """The new encoder is the old one turned: what the network says of a text must not change."""
    known = ldm_recipe(latents="means")
    torch.manual_seed(1)
    for layer in known.model.modules():  # its last layer begins as zero
        for weight in layer.parameters(recurse=False):
            torch.nn.init.normal_(weight, std=0.1)
    for layer in context_layers(known.model):
        torch.nn.init.normal_(layer.weight, std=3.0)
    turned = copy.deepcopy(known.clip)
    projection = turned.model.text_projection.weight
    with torch.no_grad():
        projection.copy_(torch.linalg.qr(torch.randn(len(projection), len(projection)))[0] @ projection)
    config = LDMTraining(model=SMALL, steps=20, batch=4, latents="means", start="somewhere", refit=True)
    model = UNet(SMALL.unet)
    model.load_state_dict(known.model.state_dict())
    with pytest.warns(UserWarning, match="refit: .*% of what tells the former encoder's contexts apart"):
        new = LDMRecipe(config, model, known.vae, turned, Words(), Latents(), None, (known.clip, known.tokenizer))
    batch, other = (steps_of(r, r.samples(), "unet")[0] for r in (known, new))
    assert not torch.allclose(batch["context"], other["context"], atol=0.01)

    @torch.no_grad()
    def answer(recipe, seen):
        label = torch.full((4,), SMALL.class_label)
        return recipe.model.eval()(seen["x0"], seen["t"] * 1000, seen["context"], label, seen["spacing"])

    wanted, deaf = answer(known, batch), answer(known, other)
    assert (answer(new, other) - wanted).abs().max() < 0.05 * (deaf - wanted).abs().max()
    with pytest.raises(ValueError, match="refit: wanted start=.*got none"):
        LDMTraining(model=SMALL, refit=True)
    with pytest.raises(ValueError, match="refit: wanted start=.*got lora"):
        LDMTraining(model=SMALL, refit=True, start="x", lora=2)
