"""`phantom(seed, findings)`: a procedural chest CT with an exactly known truth."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from t2ct.data.phantoms.abdomen import paint_abdomen
from t2ct.data.phantoms.anatomy import draw_anatomy
from t2ct.data.phantoms.body import paint_table, paint_wall
from t2ct.data.phantoms.bones import paint_bones
from t2ct.data.phantoms.canvas import Canvas
from t2ct.data.phantoms.chest import grow_trees, paint_lungs, paint_mediastinum
from t2ct.data.phantoms.findings import FINDINGS, LABELS, Finding, Scene, complete, draw_findings
from t2ct.data.phantoms.organs import FINDING_BITS, ORGAN, ORGANS, PART, PARTS
from t2ct.data.phantoms.reports import write_report
from t2ct.data.phantoms.scanner import scan
from t2ct.files import check_output_folder

if TYPE_CHECKING:
    from t2ct.data.volume import Volume

FIELD_OF_VIEW = (352.0, 352.0, 320.0)  # mm: a whole adult chest
# Vessels, ribs and skin are filled with points as dense as the finest axis, wherever the grid ends: 6 GB at 0.4 mm, and
# eight times that at half of it.
FINEST, COARSEST = 0.3, 1000.0  # mm
MOST_VOXELS = 2**30  # which take some 40 GB while they are painted

FindingLike = str | Finding | Mapping[str, object]


@dataclass(frozen=True)
class Phantom:
    """A synthetic chest CT and its truth.

    hu: (X, Y, Z) int16 HU, axes RAS. affine: (4, 4) float64 voxel -> RAS mm. report: "findings" and "impression".
    prompt: the text a model is trained on. labels: (18,) uint8 in the order of `LABELS`. present: the findings drawn.
    mask: (X, Y, Z) uint8, numbers are indices into `ORGANS`. parts: (X, Y, Z) uint8, indices into `PARTS`: lobes,
    chambers, bones, … under whatever is wrong with them. bits: (X, Y, Z) uint32, one bit per finding; see
    `finding_mask` and `organ_mask`.
    """

    seed: int
    hu: np.ndarray
    affine: np.ndarray
    report: dict[str, str]
    prompt: str
    labels: np.ndarray
    present: tuple[Finding, ...]
    mask: np.ndarray
    parts: np.ndarray | None = None
    bits: np.ndarray | None = None

    def finding_mask(self, name: str) -> np.ndarray:
        """(X, Y, Z) bool: the voxels of a finding, also where another finding covers it. Raises ValueError."""
        if name not in FINDING_BITS:
            raise ValueError(f"name: wanted one of {list(FINDING_BITS)}, got {name!r}")
        if self.bits is None:
            return np.zeros(self.mask.shape, bool)
        return self.bits & np.uint32(1 << FINDING_BITS[name]) != 0

    def organ_mask(self, name: str) -> np.ndarray:
        """(X, Y, Z) bool: the voxels of an organ of `ORGANS` or a part of `PARTS`. Raises ValueError."""
        if name in PARTS[1:] and self.parts is not None:
            return self.parts == PART[name]
        if name in ORGAN:
            return self.mask == ORGAN[name]
        raise ValueError(f"name: wanted one of {[*ORGANS, *PARTS[1:]]}, got {name!r}")

    @cached_property
    def volume(self) -> Volume:
        """The CT as a `Volume`."""
        from t2ct.data.volume import Volume

        return Volume(self.hu, self.affine, prompt=self.prompt, seed=self.seed, provenance=self._facts())

    def _facts(self) -> dict[str, object]:
        return {
            "source": "t2ct phantom",
            "seed": self.seed,
            "report": self.report,
            "labels": [name for name, on in zip(LABELS, self.labels, strict=True) if on],
            "findings": [f.as_dict() for f in self.present],
        }

    def wordings(self, count: int) -> list[str]:
        """`prompt` and count - 1 further prompts that say the same in other words, order and detail."""
        anatomy = draw_anatomy(stream(self.seed, "anatomy"))
        for f in self.present:
            FINDINGS[f.name].prepare(anatomy, f, stream(self.seed, "prepare " + f.name))
        others = (write_report(self.present, anatomy, stream(self.seed, f"report {i}")) for i in range(1, count))
        return [self.prompt, *(prompt for _, prompt in others)]

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write the volume, the masks, the report and a picture into `folder`; returns their paths.

        ct.nii.gz and ct.json; mask.nii.gz (numbers of `ORGANS`), parts.nii.gz (of `PARTS`), findings.nii.gz (bits: 1
        for the first of "finding bits" in the report, 2 for the second, …); report.json; preview.png."""
        import nibabel as nib

        check_output_folder(folder)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {"volume": "ct.nii.gz", "mask": "mask.nii.gz", "parts": "parts.nii.gz", "bits": "findings.nii.gz",
                 "report": "report.json", "preview": "preview.png"}  # fmt: skip
        paths = {key: folder / name for key, name in names.items()}
        self.volume.save(paths["volume"])
        nothing = np.zeros(self.mask.shape, np.uint8)
        masks = {"mask": self.mask, "parts": nothing if self.parts is None else self.parts,
                 "bits": nothing.astype(np.uint32) if self.bits is None else self.bits}  # fmt: skip
        for key, values in masks.items():
            image = nib.Nifti1Image(values, self.affine)
            image.header["descrip"] = f"SYNTHETIC t2ct phantom, {names[key].split('.')[0]}".encode()
            nib.save(image, paths[key])
        facts = {**self._facts(), "prompt": self.prompt, "organs": dict(enumerate(ORGANS)),
                 "parts": dict(enumerate(PARTS)), "finding bits": list(FINDING_BITS)}  # fmt: skip
        paths["report"].write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        self.volume.preview(paths["preview"])
        return paths


def stream(seed: int, name: str) -> np.random.Generator:
    """One random stream per purpose, so that more findings or words never change the anatomy of a seed."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *name.encode()])))


@dataclass(frozen=True)
class Description:
    """What is known of a phantom before it is drawn; the fields are those of `Phantom`."""

    report: dict[str, str]
    prompt: str
    labels: np.ndarray
    present: tuple[Finding, ...]


def describe(seed: int, findings: Sequence[FindingLike] | None = None) -> Description:
    """Findings, labels and report of `phantom(seed, findings)` without the volume, in about a millisecond.

    Raises as `phantom` does.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed: wanted an int, got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"seed: wanted an integer >= 0, got {seed}")
    seed = int(seed)
    if findings is None:
        wanted = draw_findings(stream(seed, "findings"))
    elif isinstance(findings, (str, Mapping, Finding)) or not isinstance(findings, Iterable):
        raise TypeError(f"findings: wanted a list of findings, got {type(findings).__name__}")
    else:
        wanted = [Finding.of(f) for f in findings]
    present = complete(wanted, lambda name: stream(seed, "draw " + name))
    labels = np.array([any(FINDINGS[f.name].label == name for f in present) for name in LABELS], np.uint8)
    report, prompt = write_report(present, draw_anatomy(stream(seed, "anatomy")), stream(seed, "report"))
    return Description(report, prompt, labels, present)


def phantom(
    seed: int,
    findings: Sequence[FindingLike] | None = None,
    size: tuple[int, int, int] = (128, 128, 64),
    spacing: tuple[float, float, float] | None = None,
) -> Phantom:
    """Build the chest CT of `seed`.

    findings: None draws them from the seed (about a quarter are normal), [] is a normal chest, otherwise names such as
    "pleural effusion", `Finding`s or dicts {"name": …, "side": …, "lobe": …, "size": …}; what is left out is drawn.
    size: voxels (X, Y, Z), each at least 16, 2^30 in all at most. spacing: mm, at least 0.3; by default the grid covers
    352 x 352 x 320 mm, so that the same seed on another grid is the same patient.

    Raises ValueError or TypeError for a seed that is not an integer >= 0, unknown findings, sides, lobes or sizes, and
    grids that are no grids. Same arguments, same bits.
    """
    grid = _triple("size", size, 16, MOST_VOXELS)
    size = (int(grid[0]), int(grid[1]), int(grid[2]))
    if any(v != int(v) for v in grid):
        raise ValueError(f"size: wanted three integers, got {grid}")
    if prod(size) > MOST_VOXELS:
        raise ValueError(f"size: wanted at most {MOST_VOXELS} voxels, got {' x '.join(map(str, size))} = {prod(size)}")
    if spacing is None:
        spacing = FIELD_OF_VIEW[0] / size[0], FIELD_OF_VIEW[1] / size[1], FIELD_OF_VIEW[2] / size[2]
    spacing = _triple("spacing", spacing, FINEST, COARSEST)

    text = describe(seed, findings)
    seed, present = int(seed), text.present
    anatomy = draw_anatomy(stream(seed, "anatomy"))
    trees = grow_trees(anatomy, stream(seed, "trees"))  # before anything is wrong: the same in sickness and in health
    for f in present:
        FINDINGS[f.name].prepare(anatomy, f, stream(seed, "prepare " + f.name))
    canvas = Canvas(size, spacing, anatomy.frame)
    x, y, z = canvas.x, canvas.y, canvas.z
    cage = anatomy.cage(x, y, z)
    lungs = anatomy.lungs(x, y, z)
    body = paint_wall(canvas, anatomy, cage, stream(seed, "wall"))
    paint_abdomen(canvas, anatomy, cage, stream(seed, "abdomen"))
    alpha = paint_lungs(canvas, anatomy, lungs, trees, stream(seed, "lungs"))
    scene = Scene(canvas, anatomy, lungs, alpha, present, stream(seed, "points"), trees)
    paint_mediastinum(canvas, anatomy)
    paint_bones(canvas, anatomy, body)
    for f in sorted(present, key=lambda f: FINDINGS[f.name].layer):
        FINDINGS[f.name].paint(scene, f, stream(seed, "paint " + f.name))
    paint_table(canvas)
    hu = scan(canvas.hu, spacing, stream(seed, "scanner"))

    return Phantom(seed, hu, canvas.affine, text.report, text.prompt, text.labels, present, canvas.mask,
                   canvas.parts, canvas.bits)  # fmt: skip


def _triple(name: str, value: object, least: float, most: float) -> tuple[float, float, float]:
    try:
        numbers = tuple(float(v) for v in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if len(numbers) != 3 or not all(least <= v <= most for v in numbers):
        wanted = f"three numbers >= {least}" if name == "size" else f"three numbers of mm from {least:g} to {most:g}"
        raise ValueError(f"{name}: wanted {wanted}, got {value!r:.200}")
    x, y, z = numbers
    return x, y, z
