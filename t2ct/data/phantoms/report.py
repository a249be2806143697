"""Radiology reports for phantoms: a small grammar with varied wording, order, negation and detail.

Every finding that is present is named; what is denied or left out is absent.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy
from t2ct.data.phantoms.findings import FINDINGS, Finding
from t2ct.data.phantoms.words import ABSENT, CLEAN, FILLER, PHRASES, PLURAL, SIZE_WORDS

Pick = Callable[[tuple[str, ...]], str]


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
    if rng.random() < 0.26:
        text = _sentence(order, rng, pick)
        return {"findings": text, "impression": ""}, text
    findings, impression = _findings(order, anatomy, rng, pick), _impression(order, rng, pick)
    return {"findings": findings, "impression": impression}, f"Findings: {findings} Impression: {impression}"


def _slots(f: Finding, rng: np.random.Generator, pick: Pick, sized: float = 0.85) -> dict[str, str]:
    """Words for one finding: its size, side and place, worded anew each time."""
    size = pick(SIZE_WORDS[f.name][f.size]) if f.size and f.name in SIZE_WORDS and rng.random() < sized else ""
    side = f.side or ""
    both = side == "bilateral"
    short = {"right": "R", "left": "L", "bilateral": "bilateral"}.get(side, "")
    if side and not both and rng.random() < 0.06:
        side = short
    lobe = f.lobe or ""
    if both:
        places = (f"both {lobe} lobes", f"the {lobe} lobes bilaterally", f"bilateral {lobe} lobes")
        place = pick(places) if lobe else "both lungs"
        hemi = pick(("on both sides", "bilaterally"))
    else:
        code = side[:1].upper() + lobe[:1].upper() + "L"  # RUL, LLL, …
        place = pick((f"the {side} {lobe} lobe", f"the {side} {lobe} lobe", f"{lobe} lobe of the {f.side} lung", code))
        if rng.random() < 0.12:
            place = f"the {f.side} lung"
        hemi = pick((f"on the {f.side}", f"on the {f.side} side", f"in the {f.side} hemithorax"))
    mm = ""
    if f.size_mm is not None:
        n = f.size_mm
        mm = pick((f"{n:g} mm", f"{n:g} mm", f"{n / 10:.1f} cm", f"{n:g}x{max(3, n - int(rng.integers(0, 3))):g} mm"))
    where = "in both lungs" if both else f"in the {f.side} lung"
    return {"size": size, "side": side, "place": place, "hemi": hemi, "where": where, "mm": mm, "lobe": lobe,
            "kind": f.kind or "", "station": _station(f, pick), "device": _device(f, pick),
            "vessel": _vessel(f, pick)}  # fmt: skip


def _station(f: Finding, pick: Pick) -> str:
    """Where lymph nodes are."""
    if f.kind in ("hilar", "axillary"):
        region = {"hilar": ("hilum", "hilar region"), "axillary": ("axilla", "axillary region")}[f.kind]
        return f"both {pick((f'{f.kind} regions', f'{f.kind} stations'))}" if f.side == "bilateral" else \
            f"the {f.side} {pick(region)}"
    return pick((f"the {f.kind} region", f"the {f.kind} station", f"the mediastinum ({f.kind})"))


def _device(f: Finding, pick: Pick) -> str:
    """What was implanted."""
    options = {
        "pacemaker": ("a {side}-sided pacemaker with leads in the right heart", "a pacemaker on the {side} chest wall",
                      "a cardiac pacemaker, {side} side, with its electrodes"),
        "defibrillator": ("an implanted defibrillator (ICD) on the {side} chest wall",
                          "a {side}-sided ICD with its electrodes"),
        "port catheter": ("a port catheter on the {side} chest wall",
                          "a {side} port with the catheter tip in the superior vena cava", "a {side} port catheter"),
        "central venous catheter": ("a central venous catheter from the {side} jugular vein",
                                    "a {side} jugular central venous catheter"),
        "sternal wires": ("sternotomy wires", "median sternotomy wires"),
        "endotracheal tube": ("an endotracheal tube", "an endotracheal tube in the trachea", "an intubation tube"),
        "nasogastric tube": ("a nasogastric tube", "a nasogastric tube ending in the stomach", "a feeding tube"),
        "chest tube": ("a {side} chest tube", "a {side}-sided thoracic drainage catheter", 
                       "a chest drain on the {side}"),
        "aortic valve prosthesis": ("an aortic valve prosthesis", "a prosthetic aortic valve"),
    }.get(f.kind or "", ("medical material",))  # fmt: skip
    return pick(options).format(side=f.side)


def _vessel(f: Finding, pick: Pick) -> str:
    """Which coronary arteries."""
    if f.kind == "multivessel":
        return pick(("the coronary arteries", "all three coronary arteries", "multiple coronary arteries"))
    return pick((f"the {f.kind} coronary artery", f"the {f.kind} coronary artery", "the coronary arteries"))


def _fill(template: str, slots: dict[str, str]) -> str:
    text = " ".join(template.format(**slots).split()).replace(" ,", ",").replace(" .", ".").replace("( ", "(")
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}")
        if text.startswith(f"a {vowel}"):
            text = "an" + text[1:]
    return text.replace("a 8", "an 8").replace("a 11 ", "an 11 ").replace("a 18 ", "an 18 ")


def _phrase(f: Finding, rng: np.random.Generator, pick: Pick, part: str) -> str:
    """A sentence without its full stop (part "findings") or a noun phrase (part "noun")."""
    key = f.name
    if f.kind and (f"{f.name}/{f.kind}") in PHRASES:
        key = f"{f.name}/{f.kind}"
    elif f.side == "bilateral" and (f"{f.name}/bilateral") in PHRASES:
        key = f"{f.name}/bilateral"
    elif f.count is not None and f.count > 1:
        key = f"{f.name}/several"
    return _fill(pick(PHRASES[key][part]), _slots(f, rng, pick))


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
            out.append(pick((f"no {pair}", f"no evidence of {pair}", f"no {words}, no {second}")))
        else:
            verb = "are" if words in PLURAL else "is"
            seen = (f"no {words} {verb} seen", f"there {verb} no {words}", f"no evidence of {words}")
            out.append(pick((f"no {words}", *seen, f"no {words} identified")))
    return out


def _findings(order: list[Finding], anatomy: Anatomy, rng: np.random.Generator, pick: Pick) -> str:
    sentences = [_phrase(f, rng, pick, "findings") for f in order]
    here = {f.name for f in order}
    room = max(1, 5 - len(sentences))
    filler = [pick(tuple(text.split("|"))) for needs_absent, text in FILLER if not here & set(needs_absent)]
    if anatomy.phase == "none":
        filler.append("the study is performed without intravenous contrast")
    else:
        filler.append("the mediastinal vessels are opacified after intravenous contrast")
    chosen = [filler[int(k)] for k in rng.permutation(len(filler))[: int(rng.integers(1, room + 1))]]
    denied = _denials(order, rng, pick, int(rng.integers(0, 3)))
    if rng.random() < 0.45:  # the usual order: airways and vessels first, then what is found, then what is not
        text = chosen[:1] + sentences + chosen[1:] + denied
    else:
        text = sentences + chosen + denied
        text = [text[int(k)] for k in rng.permutation(len(text))]
    return " ".join(_capital(s) + "." for s in text)


def _impression(order: list[Finding], rng: np.random.Generator, pick: Pick) -> str:
    if not order:
        return _capital(pick(CLEAN)) + "."
    items = [_phrase(f, rng, pick, "noun") for f in order]
    if rng.random() < 0.2:
        items += _denials(order, rng, pick, 1)
    if rng.random() < 0.2 and len(items) > 1:
        return " ".join(f"{k + 1}. {_capital(i)}." for k, i in enumerate(items))
    return " ".join(_capital(i) + "." for i in items)


def _sentence(order: list[Finding], rng: np.random.Generator, pick: Pick) -> str:
    """One sentence as somebody would type it."""
    if not order:
        typed = ("normal chest CT", "normal chest", "healthy lungs", "unremarkable CT of the chest")
        return _capital(pick((*CLEAN, *typed))) + "."
    names = [f.name for f in order]
    compressed = [f for f in order if f.kind == "compressive"]
    items = []
    for f in order:
        if f in compressed and "pleural effusion" in names:
            continue
        text = _phrase(f, rng, pick, "noun")
        if f.name == "pleural effusion" and compressed:
            text += pick((" with adjacent atelectasis", " with compressive atelectasis", " and adjacent atelectasis",
                          " with passive atelectasis of the adjacent lung"))  # fmt: skip
        items.append(text)
    text = items[0] if len(items) == 1 else ", ".join(items[:-1]) + pick((" and ", ", ", " and ", " with ")) + items[-1]
    roll = rng.random()
    if roll < 0.12:
        text = pick(("CT chest with ", "chest CT showing ", "a chest CT with ", "patient with ")) + text
    elif roll < 0.27:
        denied = _denials(order, rng, pick, 1)
        if denied:
            text += pick((". ", ", ")) + denied[0]
            text = ". ".join(_capital(t) for t in text.split(". "))
    return _capital(text) + ("." if rng.random() < 0.85 else "")


def names_known() -> list[str]:
    """Findings the grammar can name; a test holds it against the registry."""
    return [n for n in FINDINGS if n in PHRASES and n in ABSENT]
