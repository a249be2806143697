"""Reports of phantoms: every finding is named, none is denied, sides and sizes are right, wording varies."""

import re

import numpy as np
import pytest

from t2ct.data.phantoms import FINDINGS, describe, phantom
from t2ct.data.phantoms.words import ABSENT, FILLER, PHRASES, SIZE_WORDS

# What a reader looks for; written apart from the grammar.
NAMED = {
    "pleural effusion": r"pleural (effusion|fluid)",
    "pericardial effusion": r"pericardial (effusion|fluid)|pericardial sac",
    "cardiomegaly": r"cardiomegaly",
    "consolidation": r"consolidat",
    "lung nodule": r"nodule",
    "emphysema": r"emphysem",
    "atelectasis": r"atelectasis",
    "arterial wall calcification": r"(aort|arterial|atherosc).*calcifi|calcifi.*(aort|arterial|atherosc)",
    "medical material": r"pacemaker|defibrillator|icd|port|catheter|tube|drain|wires|sutures|prosthe|device",
    "coronary artery wall calcification": r"coronary",
    "hiatal hernia": r"hiat(al|us) hernia",
    "lymphadenopathy": r"lymph",
    "lung opacity": r"ground-glass|lung opacity",
    "pulmonary fibrotic sequela": r"fibro|sequela",
    "mosaic attenuation pattern": r"mosaic",
    "peribronchial thickening": r"peribronchial|bronchial wall",
    "bronchiectasis": r"bronchiecta",
    "interlobular septal thickening": r"\bsept(al|a)\b",
}
DENIES = re.compile(r"\b(no|not|without|normal|clear|unremarkable)\b")


@pytest.fixture(scope="module")
def many():
    return {seed: describe(seed) for seed in range(1000, 2000)}


def clauses(text):
    """Sentences, and within them the parts that a denial such as ", no pneumothorax" sets apart."""
    sentences = re.split(r"(?<=[a-zA-Z)])\.\s*|\d\. ", text.lower())
    return [part for s in sentences for part in re.split(r", (?=no )", s) if part]


def test_every_finding_is_named_and_never_denied(many):
    for seed, p in many.items():
        for f in p.present:
            naming = [c for c in clauses(p.prompt) if re.search(NAMED[f.name], c)]
            assert naming, (seed, f, p.prompt)
            assert not any(re.match(r"(there (is|are) )?no\b", c) for c in naming), (seed, f, p.prompt)


def test_absent_findings_are_only_mentioned_to_deny_them(many):
    for seed, p in many.items():
        here = {f.name for f in p.present}
        for name in set(FINDINGS) - here:
            for c in clauses(p.prompt):
                part = {"pleural effusion": "atelectasis", "lung opacity": "consolidat",
                        "arterial wall calcification": "coronary"}.get(name)  # fmt: skip
                if re.search(NAMED[name], c) and not (part and part in c):
                    assert DENIES.search(c), (seed, name, c)


def test_sides_are_the_sides_drawn(many):
    other = {"right": r"\bleft\b", "left": r"\bright\b"}
    for seed, p in many.items():
        if len(p.present) == 1 and p.present[0].side in other:
            text = p.prompt.lower().replace("right heart", "")
            assert not re.search(other[p.present[0].side], text), (seed, p.prompt)


def test_labels_agree_with_findings(many):
    for p in many.values():
        assert int(p.labels.sum()) == len({f.name for f in p.present})


def test_frequencies_are_learnable(many):
    normal = sum(not p.present for p in many.values()) / len(many)
    assert 0.15 < normal < 0.35
    for name in FINDINGS:
        assert 0.05 < sum(any(f.name == name for f in p.present) for p in many.values()) / len(many) < 0.4, name
    short = sum(p.report["impression"] == "" for p in many.values()) / len(many)
    assert 0.15 < short < 0.35


def test_prompt_is_made_of_the_report(many):
    for p in many.values():
        findings, impression = p.report["findings"], p.report["impression"]
        assert p.prompt == (f"Findings: {findings} Impression: {impression}" if impression else findings)
        assert 1 <= len(p.prompt.split()) <= 200
        assert "{" not in p.prompt and "  " not in p.prompt and "None" not in p.prompt and "nan" not in p.prompt.split()


def test_wording_varies():
    wanted = [{"name": "pleural effusion", "side": "right", "size": "large"}]
    texts = {describe(seed, wanted).prompt for seed in range(40)}
    assert len(texts) > 30


def test_measured_nodule_is_quoted_with_its_size():
    quoted = 0
    for seed in range(20):
        f = {"name": "lung nodule", "side": "right", "lobe": "upper", "size_mm": 17, "count": 1}
        text = describe(seed, [f]).prompt
        quoted += bool(re.search(r"\b17( mm|x)|1\.7 cm", text))
    assert quoted > 8


def test_description_is_the_phantoms(many):
    p = phantom(1003, size=(16, 16, 16))
    assert (p.prompt, p.report, p.present) == (many[1003].prompt, many[1003].report, many[1003].present)
    assert np.array_equal(p.labels, many[1003].labels)


def test_the_grammar_knows_every_finding():
    for name, disease in FINDINGS.items():
        assert name in ABSENT and name in NAMED
        forms = [name] if name in PHRASES else [f"{name}/{kind}" for kind in disease.kinds]
        assert all(PHRASES[form]["findings"] and PHRASES[form]["noun"] for form in forms)
        if name in SIZE_WORDS:
            assert set(SIZE_WORDS[name]) == set(disease.sizes)
    assert {name for untrue, _ in FILLER for name in untrue} <= set(FINDINGS)
