"""The grammar: sentences of findings, of what is normal, of what is denied; their order; how many there are.

Every finding that is present is named; what is denied or left out is absent.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from itertools import product
from math import prod

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy
from t2ct.data.phantoms.findings import FINDINGS, Finding
from t2ct.data.phantoms.reports.normal import TECHNIQUE
from t2ct.data.phantoms.reports.slots import phrase_key, slots
from t2ct.data.phantoms.reports.words import ABSENT, CLEAN, NORMAL, PHRASES, PLURAL

Pick = Callable[[tuple[str, ...]], str]
WORDS = 118  # of findings and impression together, about; only what must be said goes beyond
SHORT = 0.26  # share of prompts that are one sentence as a user would type it
TYPED = ("normal chest CT", "normal chest", "healthy lungs", "unremarkable CT of the chest")
LISTS = (" and ", ", ", " and ", " with ")
BESIDE = (" with adjacent atelectasis", " with compressive atelectasis", " and adjacent atelectasis",
          " with passive atelectasis of the adjacent lung")  # fmt: skip


def write_report(
    present: tuple[Finding, ...], anatomy: Anatomy, rng: np.random.Generator
) -> tuple[dict[str, str], str]:
    """The report {"findings", "impression"} and the prompt.

    About a quarter are one free sentence as a user would type it: then "impression" is empty and the prompt is that
    sentence; otherwise the prompt is "Findings: … Impression: …".
    """

    def pick(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    order = [present[int(k)] for k in rng.permutation(len(present))]
    if rng.random() < SHORT:
        text = _sentence(order, rng, pick)
        return {"findings": text, "impression": ""}, text
    impression = _impression(order, rng, pick)
    findings = _findings(order, anatomy, rng, pick, WORDS - len(impression.split()))
    return {"findings": findings, "impression": impression}, f"Findings: {findings} Impression: {impression}"


def forms(f: Finding, part: str) -> set[str]:
    """Every way to tell one finding: sentences (part "findings") or noun phrases (part "noun")."""
    options = slots(f)
    told = set()
    for template in PHRASES[phrase_key(f)][part]:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        for values in product(*(sorted(set(options[name])) for name in names)):
            told.add(_fill(template, dict(zip(names, values, strict=True))))
    return told


def count_forms(present: tuple[Finding, ...], contrast: bool = False) -> int:
    """How many reports the grammar has for these findings, at least: told in the usual order of sections, each normal
    sentence there or not, no denials added."""
    here = {f.name for f in present}
    usual = prod(len(forms(f, "findings")) * len(forms(f, "noun")) for f in present)
    for _, _, sentences in NORMAL:
        usual *= prod(1 + len(set(variants)) for absent, variants in sentences if not here & set(absent))
    return usual * (1 + len(TECHNIQUE[contrast])) * (1 if present else len(CLEAN))


def _fill(template: str, values: dict[str, str]) -> str:
    text = " ".join(template.format(**values).split()).replace(" ,", ",").replace(" .", ".").replace("( ", "(")
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}")
        if text.startswith(f"a {vowel}"):
            text = "an" + text[1:]
    return text.replace("a 8", "an 8").replace("a 11 ", "an 11 ").replace("a 18 ", "an 18 ")


def _phrase(f: Finding, pick: Pick, part: str) -> str:
    """A sentence without its full stop (part "findings") or a noun phrase (part "noun")."""
    chosen = {name: pick(options) for name, options in slots(f).items()}
    return _fill(pick(PHRASES[phrase_key(f)][part]), chosen)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _denials(order: list[Finding], rng: np.random.Generator, pick: Pick, count: int) -> list[str]:
    """Up to `count` sentences that deny absent findings, and nothing else."""
    here = {f.name for f in order}
    absent = [n for n in ABSENT if n not in here]
    names = [absent[int(k)] for k in rng.permutation(len(absent))]
    out: list[str] = []
    while names and len(out) < count:
        first = names.pop()
        words = pick(ABSENT[first])
        if names and rng.random() < 0.55:
            second = pick(ABSENT[names.pop()])
            pair = f"{words} or {second}"
            out.append(pick((f"no {pair}", f"no evidence of {pair}", f"no {words}, no {second}",
                             f"{words} and {second} were not detected")))  # fmt: skip
        else:
            verb, was = ("are", "were") if words in PLURAL else ("is", "was")
            out.append(pick((f"no {words}", f"no {words} {verb} seen", f"there {verb} no {words}",
                             f"no evidence of {words}", f"no {words} identified",
                             f"{words} {was} not observed")))  # fmt: skip
    return out


def _findings(order: list[Finding], anatomy: Anatomy, rng: np.random.Generator, pick: Pick, room: int) -> str:
    """Sentences of the findings, and as many of what is normal as there is room for."""
    here = {f.name for f in order}
    told = {f: _phrase(f, pick, "findings") for f in order}
    room -= sum(len(text.split()) for text in told.values())
    eager = float(rng.uniform(0.1, 1.0))  # some report every section, some hardly any
    normal: dict[str, list[str]] = {}
    sections = [NORMAL[int(k)] for k in rng.permutation(len(NORMAL))]
    for section, _, sentences in sections:
        for absent, variants in sentences:
            text = pick(variants)
            if not here & set(absent) and rng.random() < eager and len(text.split()) <= room:
                room -= len(text.split())
                normal.setdefault(section, []).append(text)
    technique = pick(TECHNIQUE[anatomy.phase != "none"])
    denied = [text for text in _denials(order, rng, pick, int(rng.integers(0, 3))) if len(text.split()) <= room - 8]
    out: list[str] = [technique] if room > 8 and rng.random() < 0.45 else []
    for section, names, _ in NORMAL:
        out += [told.pop(f) for f in order if f.name in names and f in told] + normal.get(section, [])
    out += [*told.values(), *denied]
    if rng.random() < 0.35:
        out = [out[int(k)] for k in rng.permutation(len(out))]
    return " ".join(_capital(s) + "." for s in out or [pick(CLEAN)])


def _impression(order: list[Finding], rng: np.random.Generator, pick: Pick) -> str:
    if not order:
        return _capital(pick(CLEAN)) + "."
    items = [_phrase(f, pick, "noun") for f in order]
    if rng.random() < 0.2:
        items += _denials(order, rng, pick, 1)
    if rng.random() < 0.2 and len(items) > 1:
        return " ".join(f"{k + 1}. {_capital(i)}." for k, i in enumerate(items))
    return " ".join(_capital(i) + "." for i in items)


def _sentence(order: list[Finding], rng: np.random.Generator, pick: Pick) -> str:
    """One sentence as somebody would type it."""
    if not order:
        return _capital(pick((*CLEAN, *TYPED))) + "."
    names = [f.name for f in order]
    compressed = [f for f in order if f.kind == "compressive"]
    items = []
    for f in order:
        if f in compressed and "pleural effusion" in names:
            continue
        text = _phrase(f, pick, "noun")
        if f.name == "pleural effusion" and compressed:
            text += pick(BESIDE)
        items.append(text)
    text = items[0] if len(items) == 1 else ", ".join(items[:-1]) + pick(LISTS) + items[-1]
    roll = rng.random()
    if roll < 0.12:
        text = pick(("CT chest with ", "chest CT showing ", "a chest CT with ", "patient with ")) + text
    elif roll < 0.27:
        denied = _denials(order, rng, pick, 1)
        if denied:
            # After a comma "… were not detected" could deny all that came before.
            text += (". " if "not" in denied[0].split() else pick((". ", ", "))) + denied[0]
            text = ". ".join(_capital(t) for t in text.split(". "))
    return _capital(text) + ("." if rng.random() < 0.85 else "")


def names_known() -> list[str]:
    """Findings the grammar can name; a test holds it against the registry."""
    return [n for n in FINDINGS if any(key.split("/")[0] == n for key in PHRASES) and n in ABSENT]
