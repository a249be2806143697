"""Reads a chest CT report back: which of the 18 findings it asserts or denies, with side, lobe and size.

    >>> [f.name for f in read_report("Small left pleural effusion. No consolidation.").findings]
    ['pleural effusion']

Rules, no model: sentences are cut at commas, "and" and "with" into pieces that each tell of one finding; "no …" and
"… was not seen" deny. Made for the style of CT-RATE. It reads every report that phantoms write; of a real report, it
reads what is told in these words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from t2ct.data.phantoms.findings import FINDINGS, LABELS, Finding
from t2ct.data.phantoms.reports.words import SIZE_WORDS

# What names a finding. The first pattern that matches a place claims it.
NAMED = {
    "coronary artery wall calcification": r"coronary[^.;]*(calcif|plaque|atheroscl)|(calcif|plaque|atheroscl)[^.;]*"
    r"coronary",
    "arterial wall calcification": r"(aort|arterial|arteries|vascular)[^.;]*calcif|calcif[^.;]*(aort|arter(y|ies|ial))",
    "pericardial effusion": r"pericardial (effusion|fluid|sac)",
    "pleural effusion": r"(pleural|hydro) ?(effusion|fluid)s?|fluid[^.;]*pleural spaces?|hydrothorax",
    "cardiomegaly": r"cardiomegaly|(heart|cardiac)( size)? (is|are|was) (enlarged|increased)|cardiac enlargement|"
    r"enlarge(d|ment of the) heart|cardiothoracic (ratio|index) is increased",
    "interlobular septal thickening": r"(interlobular|septal) (septal )?thickening|interlobular sept|kerley|"
    r"thickening of the interlobular septa",
    "peribronchial thickening": r"peribronchial (thickening|cuffing)|bronchial walls?( is| are)? thicken|"
    r"thickening of the bronchial walls?",
    "bronchiectasis": r"bronchiecta|dilated bronchi",
    "mosaic attenuation pattern": r"mosaic",
    "emphysema": r"emphysem|bulla",
    "atelectasis": r"\batelecta",
    "consolidation": r"consolidat",
    "lung nodule": r"nodul",
    "lung opacity": r"ground.glass|lung opacit|infiltrat",
    "pulmonary fibrotic sequela": r"fibro|sequela|scarring",
    "hiatal hernia": r"hiat(al|us) hernia",
    "lymphadenopathy": r"lymphadenopath|enlarged lymph nodes?|lymph nodes?[^.;]*(enlarged|patholog)",
    "medical material": r"pacemaker|defibrillator|\bicd\b|catheter|\bport\b|\bwires?\b|sutures|\btubes?\b|\bdrain\b|"
    r"prosthe|\bstents?\b|medical material|implanted device|electrode",
}
# What else says that something is absent.
CLEAR = (
    (r"\bnormal (chest|examination)|no acute cardio|no significant abnorm|within normal limits|"
     r"unremarkable (exam|ct)|no pathological finding", tuple(NAMED)),
    (r"(lungs are (clear|well aerated without)|aeration of both|healthy lungs|no active infiltration)",
     ("consolidation", "lung nodule", "emphysema", "atelectasis", "lung opacity", "pulmonary fibrotic sequela",
      "mosaic attenuation pattern", "interlobular septal thickening", "bronchiectasis", "peribronchial thickening")),
    (r"heart (size|contour)[^.]*normal|heart is (not enlarged|of normal)", ("cardiomegaly",)),
    (r"pericardium is (normal|unremark)", ("pericardial effusion",)),
    (r"pleural spaces are (clear|free)", ("pleural effusion",)),
    (r"thoracic aorta is normal|vascular structures (are|appear) (normal|natural)|aorta and its branches are unrem",
     ("arterial wall calcification", "coronary artery wall calcification")),
    (r"oesophag[^.]*(unremarkable|normal)", ("hiatal hernia",)),
)  # fmt: skip
# Says nothing of the 18.
LIMITS = re.compile(r"(calibr\w+|diameter)[^.]*(aorta|arter|great vessels)[^.]*normal|arter\w+ calibr\w+")
NOT_AFTER = re.compile(r"\b(was|were|is|are) (not|absent)\b|\bruled out\b")
NOT_BEFORE = re.compile(r"\b(no|without|not|free of|absence of)\b")
DEVICES = (
    ("defibrillator", r"defibrillator|\bicd\b"), ("pacemaker", r"pacemaker"), ("port catheter", r"\bport\b"),
    ("sternal wires", r"\bwires?\b|sutures"), ("endotracheal tube", r"endotracheal|intubation"),
    ("nasogastric tube", r"nasogastric|feeding tube"), ("chest tube", r"chest tube|\bdrain|thoracic drainage"),
    ("aortic valve prosthesis", r"prosthe"), ("central venous catheter", r"central venous|jugular"),
)  # fmt: skip
KINDS = {
    **{name: tuple((kind, kind) for kind in kinds) for name, kinds in (
        ("emphysema", ("centrilobular", "paraseptal")), ("bronchiectasis", ("cylindrical", "varicose", "cystic")),
        ("lymphadenopathy", ("paratracheal", "subcarinal", "prevascular", "hilar", "axillary")),
    )},
    "medical material": DEVICES,
    "coronary artery wall calcification": (
        ("left anterior descending", "left anterior descending"), ("circumflex", "circumflex"),
        ("right", "right coronary"), ("multivessel", r"(all three|multiple) coronary|multivessel"),
    ),
    "atelectasis": (
        ("compressive", r"compressive|passive|\badjacent"), ("linear", r"\blinear|plate-like|subsegmental|\bband"),
        ("lobar", r"\blobar|collapse|complete atelectasis"),
    ),
}  # fmt: skip
SEVERAL = re.compile(r"\b(multiple|several|numerous|both lungs)\b")


@dataclass(frozen=True)
class Reading:
    """What a report says. findings: asserted, in order of reading, what is not said being None. denied: names."""

    findings: tuple[Finding, ...] = ()
    denied: frozenset[str] = frozenset()
    sizes: tuple[frozenset[str], ...] = field(default=(), repr=False)  # which sizes the words of each finding may mean

    @property
    def labels(self) -> np.ndarray:
        """(18,) uint8 in the order of `LABELS`."""
        here = {FINDINGS[f.name].label for f in self.findings}
        return np.array([name in here for name in LABELS], np.uint8)


def read_report(text: str) -> Reading:
    """The 18 findings in a report or a sentence. Raises TypeError for what is not text."""
    if not isinstance(text, str):
        raise TypeError(f"text: wanted a str, got {type(text).__name__}")
    findings: list[Finding] = []
    sizes: list[frozenset[str]] = []
    denied: set[str] = set()
    for sentence in _sentences(text):
        for pattern, names in CLEAR:
            if re.search(pattern, sentence) and not LIMITS.search(sentence):
                denied |= set(names)
        after = bool(NOT_AFTER.search(sentence))
        before = NOT_BEFORE.search(sentence)
        start = 0 if after else before.start() if before else len(sentence)
        for name, piece, at in _mentions(sentence):
            if at >= start:
                denied.add(name)
            else:
                finding, may_be = _describe(name, piece[: max(0, start - at) + len(piece)])
                findings.append(finding)
                sizes.append(may_be)
    return Reading(tuple(findings), frozenset(denied), tuple(sizes))


def contradictions(text: str, present: Sequence[Finding]) -> list[str]:
    """What a report says that is not true of a chest with these findings, and what it leaves out; [] if it is right.

    A mention must fit one of the findings of its name in all that it says: side, lobe, size, measurement, kind, and
    whether nodules are several."""
    reading = read_report(text)
    here = {f.name for f in present}
    told = {f.name for f in reading.findings}
    wrong = [f"{name}: there, but not told" for name in sorted(here - told)]
    wrong += [f"{name}: told, but not there" for name in sorted(told - here)]
    wrong += [f"{name}: there, but denied" for name in sorted(here & reading.denied)]
    for said, may_be in zip(reading.findings, reading.sizes, strict=True):
        same = [f for f in present if f.name == said.name]
        if same and not any(_fits(said, may_be, f) for f in same):
            wrong.append(f"{said.name}: told as {said.as_dict()} {sorted(may_be)}, is {[f.as_dict() for f in same]}")
    return wrong


def _fits(said: Finding, may_be: frozenset[str], f: Finding) -> bool:
    plain = all(getattr(said, key) in (None, getattr(f, key)) for key in ("side", "lobe", "kind"))
    measured = said.size_mm is None or (f.size_mm is not None and abs(said.size_mm - f.size_mm) <= 0.51)
    several = said.count is None or (f.count or 1) > 1
    return plain and measured and several and (not may_be or f.size is None or f.size in may_be)


def _sentences(text: str) -> list[str]:
    """Lower-case sentences; abbreviations of lobes and sides written out."""
    text = re.sub(r"\b(R|L)([UML])L\b", lambda m: f"{_SIDE[m[1]]} {_LOBE[m[2]]} lobe", text)
    text = re.sub(r"\b(R|L)\b(?=[ -])", lambda m: _SIDE[m[1]], text)
    text = re.sub(r"\b(Findings|Impression):", ". ", text)
    text = re.sub(r"(^|\. ?)\s*\d+\. ", ". ", text)
    return [part.strip().lower() for part in re.split(r"\.(?!\d)|;", text) if part.strip()]


_SIDE = {"R": "right", "L": "left"}
_LOBE = {"U": "upper", "M": "middle", "L": "lower"}
_CUT = re.compile(r", | and | with |: | \(|\) ")


def _mentions(sentence: str) -> list[tuple[str, str, int]]:
    """(name, words about it, where it is named) for every finding named in a sentence."""
    pieces: list[list] = []  # [start, end, name, where]
    start = 0
    cuts = [*((m.start(), m.end()) for m in _CUT.finditer(sentence)), (len(sentence), len(sentence))]
    for stop, following in cuts:
        for name, at in _named(sentence[start:stop]):
            pieces.append([start, stop, name, start + at])
        if not _named(sentence[start:stop]):
            if pieces:  # more about what came before
                last = pieces[-1][1]
                for piece in pieces:
                    if piece[1] == last:
                        piece[1] = stop
            else:
                pieces.append([start, stop, None, start])
        start = following
    if len(pieces) > 1 and pieces[0][2] is None:  # an opening such as "in the left lung, …"
        pieces[1][0] = pieces[0][0]
        pieces.pop(0)
    # A whole sentence may name what no piece does: "lymph nodes in the left hilum are enlarged, up to 2 cm".
    if not any(name for _, _, name, _ in pieces):
        pieces = [[0, len(sentence), name, at] for name, at in _named(sentence)]
    merged: list[list] = []
    for piece in pieces:
        if merged and merged[-1][2] == piece[2]:
            merged[-1][1] = piece[1]
        else:
            merged.append(piece)
    return [(name, sentence[a:b], at) for a, b, name, at in merged if name]


def _named(words: str) -> list[tuple[str, int]]:
    """The findings named in a piece and where, each place claimed once."""
    found: list[tuple[str, int]] = []
    taken: list[tuple[int, int]] = []
    for name, pattern in NAMED.items():
        match = re.search(pattern, words)
        if match and not any(a < match.end() and match.start() < b for a, b in taken):
            taken.append(match.span())
            found.append((name, match.start()))
    return sorted(found, key=lambda pair: pair[1])


def _describe(name: str, words: str) -> tuple[Finding, frozenset[str]]:
    """Side, lobe, kind, measurement and possible sizes told about a finding."""
    disease = FINDINGS[name]
    plain = re.sub(r"(right|left) (heart|atrium|ventric\w+|coronary|anterior|main)", "", words)
    side = None
    if disease.sides:
        if re.search(r"\b(both|bilateral|bilaterally)\b", plain):
            side = "bilateral" if "bilateral" in disease.sides else None
        else:
            sides = set(re.findall(r"\b(right|left)\b", plain))
            side = sides.pop() if len(sides) == 1 else None
    lobe = re.search(r"\b(upper|middle|lower)\b(?= lobe)", plain) if disease.lobes else None
    kind = next((k for k, pattern in KINDS.get(name, ()) if re.search(pattern, words)), None)
    measured = re.search(r"(\d+(?:\.\d+)?)(?:\s?x\s?(\d+(?:\.\d+)?))?\s?(mm|cm)\b", words)
    size_mm = None
    if measured:  # the larger of two diameters
        size_mm = max(float(n) for n in measured.groups()[:2] if n) * (10 if measured[3] == "cm" else 1)
    count = 2 if name == "lung nodule" and SEVERAL.search(words) else None  # or more
    may_be: set[str] = set()
    best = 0
    for size, options in SIZE_WORDS.get(name, {}).items():
        for option in options:
            if option and re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", words) and len(option) >= best:
                may_be = {size} if len(option) > best else may_be | {size}
                best = len(option)
    return Finding(name, side, lobe[1] if lobe else None, None, kind, size_mm, count), frozenset(may_be)
