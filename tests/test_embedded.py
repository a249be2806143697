"""The model in the package: small, makes a chest, listens. (How well it listens: python -m t2ct.eval.listens.)"""

import warnings

import numpy as np
import pytest
import torch

import t2ct
from t2ct.checks import EMBEDDED
from t2ct.data.phantoms import LABELS, phantom
from t2ct.eval import verdicts
from t2ct.eval.grid import coarsen
from t2ct.eval.look import open_judge
from t2ct.eval.metrics.factual import auc
from t2ct.models.judge import FILE
from t2ct.pipeline import T2CTPipeline
from t2ct.train.data.phantoms import PhantomSource

needs_embedded = pytest.mark.skipif(
    not (EMBEDDED / "unet.safetensors").exists(), reason="the package holds no embedded model"
)
needs_judge = pytest.mark.skipif(not (EMBEDDED / FILE).exists(), reason="the package holds no judge")


FOLLOWED = {  # prompts of what fills many voxels; the smallest findings are drawn less surely
    "Cardiomegaly": "Marked cardiomegaly.",
    "Pericardial effusion": "Large pericardial effusion.",
    "Hiatal hernia": "Large hiatal hernia.",
    "Emphysema": "Severe emphysema in both upper lobes.",
    "Consolidation": "Lobar consolidation in the right lower lobe.",
    "Peribronchial thickening": "Severe peribronchial thickening in both lungs.",
    "Interlobular septal thickening": "Severe interlobular septal thickening in both lungs.",
    "Pleural effusion": "Large left pleural effusion.",
}


@needs_embedded
def test_the_embedded_model_is_small():
    assert sum(p.stat().st_size for p in EMBEDDED.iterdir()) <= 40e6


@needs_embedded
@needs_judge
def test_the_embedded_model_draws_what_is_asked_for():
    """The judge finds a finding likelier where the prompt names it than where other prompts name others."""
    pipe = T2CTPipeline.from_pretrained(device="cpu")
    made = pipe(list(FOLLOWED.values()), generator=3, num_inference_steps=5, output_type="np", progress=False)
    judge, _ = open_judge(None, None, "cpu", phantoms=True)
    says = judge(torch.from_numpy(np.stack(made)).float()[:, None]).numpy()
    ranks = []
    for k, name in enumerate(FOLLOWED):
        of = says[:, LABELS.index(name)]
        ranks.append((np.delete(of, k) < of[k]).mean())
    assert np.mean(ranks) >= 0.9, dict(zip(FOLLOWED, ranks, strict=True))


@needs_embedded
def test_the_embedded_model_makes_a_chest():
    """Air around a body, aerated lungs in it, bone, and the same bits twice."""
    told = {"device": "cpu", "num_inference_steps": 8, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        volume = t2ct.generate("Normal chest CT.", seed=0, **told)
    assert min(volume.shape[:2]) >= 64
    assert volume.shape[2] >= 32
    hu, _ = coarsen(volume.hu, np.abs(np.diag(volume.affine)[:3]))
    corners = hu[[0, 0, -1, -1], [-1, -3, -1, -3]]  # in front of the patient, at both sides
    assert np.median(corners) < -900
    middle = hu[:, :, hu.shape[2] // 2]
    assert 0.2 < (middle > -300).mean() < 0.8
    assert 0.05 < (hu < -600)[16:48, 16:48, 8:24].mean() < 0.8
    assert (hu > 200).mean() > 0.001
    assert np.array_equal(volume.hu, t2ct.generate("Normal chest CT.", seed=0, **told).hu)


@needs_embedded
def test_effusion_lies_on_the_side_that_was_asked_for():
    """Denser right base with a right effusion, denser left base with a left one, on most of a few seeds."""
    pipe = T2CTPipeline.from_pretrained(device="cpu")
    differences = []
    for side in ("right", "left"):
        prompts = [f"Large {side} pleural effusion."] * 3
        made = pipe(prompts, generator=1, num_inference_steps=5, output_type="np", progress=False)
        hu = np.stack([coarsen(one, pipe.spacing)[0] for one in made])
        back = hu[:, :, 14:30, 8:18]  # posterior, lower half of the chest
        right, left = back[:, 34:54].mean((1, 2, 3)), back[:, 10:30].mean((1, 2, 3))
        differences.append((right - left) if side == "right" else (left - right))
    assert (np.concatenate(differences) > 0).mean() >= 0.75


@needs_judge
def test_the_judge_in_the_package():
    """Small, finds what phantoms show that it was not trained on, and warns before it looks at anything else."""
    assert (EMBEDDED / FILE).stat().st_size <= 6e6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge, _ = open_judge(None, None, "cpu", phantoms=True)
    with pytest.warns(UserWarning, match="of scans it says little; t2ct train judge --data SCANS"):
        again, _ = open_judge(None, EMBEDDED, "cpu", phantoms=False)
    source = PhantomSource(24, "test", judge.config.size)
    hu = torch.from_numpy(np.stack([source.read(i).hu for i in range(24)])).float()[:, None]
    labels = np.array([e.labels for e in source.entries])
    says = judge(hu).numpy()
    assert np.array_equal(judge(hu[:2]).numpy(), again(hu[:2]).numpy())
    areas = [auc(says[:, k], labels[:, k]) for k in range(18)]
    assert np.nanmean(areas) > 0.85 and areas[LABELS.index("Pleural effusion")] > 0.95
    told = verdicts(phantom(700_000_001, [{"name": "pleural effusion", "side": "left", "size": "large"}]).volume)
    (effusion,) = (v for v in told if v.finding == "Pleural effusion")
    assert effusion.probability > 0.9 and effusion.side == "left" and effusion.size in ("moderate", "large")
