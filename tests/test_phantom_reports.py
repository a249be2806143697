"""Reports of phantoms: read back by rules they tell the truth, the whole of it, in very many ways."""

import re
from dataclasses import replace

import numpy as np
import pytest

from t2ct.data.phantoms import FINDINGS, LABELS, Finding, describe, phantom
from t2ct.data.phantoms.findings.together import ALONE, BRINGS, MOST
from t2ct.data.phantoms.reader import CLEAR, NAMED, contradictions, read_report
from t2ct.data.phantoms.reports import count_forms, names_known
from t2ct.data.phantoms.reports.grammar import forms
from t2ct.data.phantoms.reports.words import ABSENT, NORMAL, PHRASES, SIZE_WORDS


@pytest.fixture(scope="module")
def many():
    return {seed: describe(seed) for seed in range(1000, 1800)}


def test_reports_read_back_as_the_truth(many):
    for seed, p in many.items():
        assert contradictions(p.prompt, p.present) == [], (seed, p.prompt)
        assert np.array_equal(read_report(p.prompt).labels, p.labels), (seed, p.prompt)


@pytest.mark.slow
def test_ten_thousand_reports_and_none_wrong():
    wrong = {seed: told for seed in range(10_000) if (told := contradictions((p := describe(seed)).prompt, p.present))}
    assert not wrong


def test_other_wordings_read_back_too(many):
    for seed in range(1000, 1030):
        p = phantom(seed, size=(16, 16, 16))
        for text in p.wordings(4):
            assert contradictions(text, p.present) == [], text


OTHER = {"side": {"right": "left", "left": "right", "bilateral": "right"},
         "lobe": {"upper": "lower", "middle": "upper", "lower": "upper"}}  # fmt: skip


def test_a_report_of_something_else_is_wrong(many):
    """The reader would see a side, a lobe, a size or a finding that is not the one drawn."""
    seen = dict.fromkeys(("side", "lobe", "size_mm", "size", "count", "kind"), 0)
    for p in many.values():
        for f in p.present:
            others = [o for o in p.present if o is not f]
            assert contradictions(p.prompt, others) or any(o.name == f.name for o in others)
            changed = {"side": OTHER["side"].get(f.side), "lobe": OTHER["lobe"].get(f.lobe),
                       "size_mm": f.size_mm and f.size_mm + 3}  # fmt: skip
            if f.count and f.count > 1:
                changed["count"] = 1
            if f.kind and f.name in ("coronary artery wall calcification", "emphysema", "lymphadenopathy"):
                changed["kind"] = next(k for k in FINDINGS[f.name].kinds if k != f.kind)
            if f.size and len(FINDINGS[f.name].sizes) > 1:
                sizes = list(FINDINGS[f.name].sizes)
                changed["size"] = sizes[-1] if f.size == sizes[0] else sizes[0]
            for key, value in changed.items():
                if value:
                    seen[key] += bool(contradictions(p.prompt, [*others, replace(f, **{key: value})]))
    assert all(count > 100 for key, count in seen.items() if key != "count") and seen["count"] > 10, seen
    absent = [p for p in many.values() if not any(f.name == "emphysema" for f in p.present)]
    missed = [p for p in absent if not contradictions(p.prompt, [*p.present, Finding("emphysema", size="mild")])]
    assert len(absent) > 100 and not missed


@pytest.mark.parametrize(
    ("text", "present"),
    [
        ("Calcification of the right coronary artery.",
         [Finding("coronary artery wall calcification", kind="circumflex")]),
        ("Linear atelectasis in the right lung.", [Finding("atelectasis", "right", kind="lobar")]),
        ("Pulmonary nodules in both lungs.", [Finding("lung nodule", "right", size_mm=8, count=1)]),
        ("Multiple pulmonary nodules, the largest in the right lung.", [Finding("lung nodule", "right", count=1)]),
        ("8x25 mm nodule in the right lung.", [Finding("lung nodule", "right", size_mm=8)]),
    ],
)
def test_contradictions_of_kind_number_and_second_diameter(text, present):
    assert contradictions(text, present)
    f = present[0]
    right = {"coronary artery wall calcification": replace(f, kind="right"), "atelectasis": replace(f, kind="linear"),
             "lung nodule": replace(f, count=3, size_mm=25 if "25" in text else f.size_mm)}  # fmt: skip
    assert not contradictions(text, [right[f.name]])


READ = (
    ("Small left pleural effusion. No consolidation.", ["pleural effusion left small"], ["consolidation"]),
    ("Bilateral effusions are not seen; 7x6 mm nodule in the RLL", ["lung nodule right lower 7 mm"], []),
    ("Pericardial effusion-thickening was not observed.", [], ["pericardial effusion"]),
    ("Mild cardiomegaly without pleural effusion or consolidation", ["cardiomegaly mild"],
     ["pleural effusion", "consolidation"]),
    ("In the left upper lobe, patchy ground glass densities.", ["lung opacity left upper patchy"], []),
    ("Findings: Heart size is normal. Impression: 1. Large hiatal hernia. 2. 1.8 cm nodule in the left lung.",
     ["hiatal hernia large", "lung nodule left 18 mm"], ["cardiomegaly"]),
    ("Calcified plaques in the aortic arch and coronary artery calcification.",
     ["arterial wall calcification", "coronary artery wall calcification"], []),
    ("Diameters of the thoracic aorta are within normal limits.", [], []),
    ("Normal chest CT.", [], list(FINDINGS)),
    ("", [], []),
)  # fmt: skip


@pytest.mark.parametrize(("text", "told", "denied"), READ)
def test_the_reader_on_sentences_of_its_own(text, told, denied):
    reading = read_report(text)
    words = []
    for f, may_be in zip(reading.findings, reading.sizes, strict=True):
        size = f"{f.size_mm:g} mm" if f.size_mm else " ".join(sorted(may_be))
        words.append(" ".join(w for w in (f.name, f.side, f.lobe, size) if w))
    assert words == told
    assert reading.denied == set(denied)


def test_the_reader_refuses_what_is_no_text():
    with pytest.raises(TypeError, match="text: wanted a str, got NoneType"):
        read_report(None)


def test_sides_are_the_sides_drawn(many):
    other = {"right": r"\bleft\b", "left": r"\bright\b"}
    for seed, p in many.items():
        if len(p.present) == 1 and p.present[0].side in other:
            assert not re.search(other[p.present[0].side], p.prompt.lower()), (seed, p.prompt)


def test_labels_agree_with_findings(many):
    for p in many.values():
        assert int(p.labels.sum()) == len({f.name for f in p.present})
    assert {FINDINGS[name].label for name in FINDINGS} == set(LABELS)


def share(many, *names):
    return np.mean([all(any(f.name == name for f in p.present) for name in names) for p in many.values()])


def test_frequencies_are_learnable(many):
    assert 0.15 < np.mean([not p.present for p in many.values()]) < 0.35
    for name in FINDINGS:
        assert 0.05 < share(many, name) < 0.4, name
    assert max(len(p.present) for p in many.values()) <= MOST + 1
    short = np.mean([p.report["impression"] == "" for p in many.values()])
    assert 0.15 < short < 0.35


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("pleural effusion", "atelectasis"),
        ("emphysema", "lung nodule"),
        ("bronchiectasis", "peribronchial thickening"),
        ("arterial wall calcification", "coronary artery wall calcification"),
        ("cardiomegaly", "pleural effusion"),
    ],
)
def test_findings_come_together_as_in_patients(many, first, then):
    ill = np.mean([bool(p.present) for p in many.values()])
    together = share(many, first, then) / share(many, first)
    assert together > 1.2 * share(many, then) / ill
    assert set(ALONE) == set(FINDINGS) and {n for row in BRINGS.values() for n in row} <= set(FINDINGS)


def test_prompt_is_made_of_the_report(many):
    for p in many.values():
        findings, impression = p.report["findings"], p.report["impression"]
        assert p.prompt == (f"Findings: {findings} Impression: {impression}" if impression else findings)
        assert 1 <= len(p.prompt.split()) <= 160
        assert "{" not in p.prompt and "  " not in p.prompt and "None" not in p.prompt and "nan" not in p.prompt.split()
    assert np.mean([len(p.prompt.split()) <= 130 for p in many.values()]) > 0.97


def test_the_grammar_has_more_than_a_million_forms():
    """By counting, and the count is no fiction: forms of a finding are distinct, and all of them are read right."""
    assert count_forms(()) > 1e6
    for name in FINDINGS:
        present = describe(5, [name]).present
        assert count_forms(present) > 1e6, name
        told = forms(present[0], "findings")
        assert len(told) > 4
        for text in sorted(told)[:: max(1, len(told) // 12)]:
            assert contradictions(text, present) == [] or present[0].kind == "compressive", text
    wanted = [{"name": "pleural effusion", "side": "right", "size": "large"}]
    assert len({describe(seed, wanted).report["findings"] for seed in range(60)}) > 50


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


def test_the_grammar_and_the_reader_know_every_finding():
    assert set(names_known()) == set(NAMED) == set(FINDINGS)
    for name, disease in FINDINGS.items():
        assert name in ABSENT
        keys = [key for key in PHRASES if key.split("/")[0] == name]
        assert all(PHRASES[key]["findings"] and PHRASES[key]["noun"] for key in keys)
        if name in SIZE_WORDS:
            assert set(SIZE_WORDS[name]) == set(disease.sizes)
    used = {name for _, here, sentences in NORMAL for absent, _ in sentences for name in (*here, *absent)}
    assert used <= set(FINDINGS) and {name for _, names in CLEAR for name in names} <= set(FINDINGS)
