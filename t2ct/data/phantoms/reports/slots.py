"""What may fill the slots of a phrase: size, side, place, measurement, station, device, vessel of one finding."""

from __future__ import annotations

from t2ct.data.phantoms.findings import Finding
from t2ct.data.phantoms.reports.words import PHRASES, SIZE_WORDS

DEVICES = {
    "pacemaker": ("a {side}-sided pacemaker with leads in the heart", "a pacemaker on the {side} chest wall",
                  "a cardiac pacemaker, {side} side, with its electrodes"),
    "defibrillator": ("an implanted defibrillator (ICD) on the {side} chest wall",
                      "a {side}-sided ICD with its electrodes"),
    "port catheter": ("a port catheter on the {side} chest wall", "a {side} port catheter",
                      "a {side}-sided port with its tip in the superior vena cava"),
    "central venous catheter": ("a central venous catheter from the {side} jugular vein",
                                "a {side} jugular central venous catheter"),
    "sternal wires": ("sternotomy wires", "median sternotomy wires"),
    "endotracheal tube": ("an endotracheal tube", "an endotracheal tube in the trachea", "an intubation tube"),
    "nasogastric tube": ("a nasogastric tube", "a nasogastric tube ending in the stomach", "a feeding tube"),
    "chest tube": ("a {side} chest tube", "a {side}-sided thoracic drainage catheter", "a chest drain on the {side}"),
    "aortic valve prosthesis": ("an aortic valve prosthesis", "a prosthetic aortic valve"),
}  # fmt: skip
REGIONS = {"hilar": ("hilum", "hilar region"), "axillary": ("axilla", "axillary region")}


def phrase_key(f: Finding) -> str:
    """The entry of `PHRASES` that a finding is told with."""
    if f.kind and f"{f.name}/{f.kind}" in PHRASES:
        return f"{f.name}/{f.kind}"
    if f.side == "bilateral" and f"{f.name}/bilateral" in PHRASES:
        return f"{f.name}/bilateral"
    if f.count is not None and f.count > 1:
        return f"{f.name}/several"
    return f.name


def slots(f: Finding) -> dict[str, tuple[str, ...]]:
    """slot -> what may stand there; repeated what is said more often."""
    return {
        "size": _sizes(f),
        **_places(f),
        "mm": _millimetres(f),
        "lobe": (f.lobe or "",),
        "kind": (f.kind or "",),
        "station": _stations(f),
        "device": tuple(text.format(side=f.side) for text in DEVICES.get(f.kind or "", ("medical material",))),
        "vessel": _vessels(f),
    }


def _sizes(f: Finding) -> tuple[str, ...]:
    words = SIZE_WORDS.get(f.name, {}).get(f.size or "", ("",))
    return (*words, *words, "") if len(words) < 3 else (*words, *words, *words, "", "")


def _places(f: Finding) -> dict[str, tuple[str, ...]]:
    side, lobe = f.side or "", f.lobe or ""
    if side == "bilateral":
        place: tuple[str, ...] = ("both lungs",)
        if lobe:
            place = (f"both {lobe} lobes", f"the {lobe} lobes bilaterally", f"bilateral {lobe} lobes",
                     f"the {lobe} lobes of both lungs")  # fmt: skip
        return {"side": (side,), "place": place, "hemi": ("on both sides", "bilaterally"),
                "where": ("in both lungs", "bilaterally", "on both sides")}  # fmt: skip
    code = side[:1].upper() + lobe[:1].upper() + "L"  # RUL, LLL, …
    whole = (f"the {side} {lobe} lobe", f"the {side} {lobe} lobe", f"{lobe} lobe of the {side} lung")
    place = (*whole, *whole, code, code, f"the {side} lung") if lobe else (f"the {side} lung",)
    hemi = (f"on the {side}", f"on the {side} side", f"in the {side} hemithorax")
    letter = side[:1].upper()
    return {"side": (*(side,) * 15, letter) if side else ("",), "place": place, "hemi": hemi,
            "where": (f"in the {side} lung", f"on the {side}")}  # fmt: skip


def _millimetres(f: Finding) -> tuple[str, ...]:
    if f.size_mm is None:
        return ("",)
    n = f.size_mm
    pairs = tuple(f"{n:g}x{max(3, n - k):g} mm" for k in range(3))
    return (*(f"{n:g} mm",) * 6, *(f"{n / 10:.1f} cm",) * 3, *pairs)


def _stations(f: Finding) -> tuple[str, ...]:
    if f.kind not in REGIONS:
        return (f"the {f.kind} region", f"the {f.kind} station", f"the mediastinum ({f.kind})")
    if f.side == "bilateral":
        return (f"both {f.kind} regions", f"both {f.kind} stations", f"the {f.kind} regions bilaterally")
    return tuple(f"the {f.side} {region}" for region in REGIONS[f.kind])


def _vessels(f: Finding) -> tuple[str, ...]:
    if f.kind == "multivessel":
        return ("the coronary arteries", "all three coronary arteries", "multiple coronary arteries")
    return (f"the {f.kind} coronary artery", f"the {f.kind} coronary artery", "the coronary arteries")
