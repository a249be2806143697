"""What a finding is, and the scene it is drawn into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from numbers import Integral, Real

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy
from t2ct.data.phantoms.canvas import ALL, Array, Box, Canvas
from t2ct.data.phantoms.trees import Tree

POINTS = 8000  # drawn per side for `Scene.points`
SIDES = {"right": (1,), "left": (-1,), "bilateral": (1, -1)}

# The 18 abnormalities of CT-RATE, in the order of its CSV.
LABELS = (
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
    "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis", "Lung nodule",
    "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern",
    "Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One finding. What is None is drawn from the seed, or means nothing for this finding."""

    name: str
    side: str | None = None
    lobe: str | None = None
    size: str | None = None
    kind: str | None = None
    size_mm: float | None = None  # diameter of a nodule
    count: int | None = None

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            kind, words = {"size_mm": (Real, "a number"), "count": (Integral, "an integer")}.get(key, (str, "a text"))
            if (value is not None or key == "name") and (not isinstance(value, kind) or isinstance(value, bool)):
                raise TypeError(f"findings: wanted {words} as {key}, got {value!r:.80}")

    @staticmethod
    def of(value: object) -> Finding:
        """From a name, a `Finding`, or a mapping of its fields. Raises TypeError or ValueError."""
        if isinstance(value, Finding):
            return value
        if isinstance(value, str):
            return Finding(value)
        if isinstance(value, Mapping):
            fields = Finding.__dataclass_fields__
            unknown = sorted(str(k) for k in value if k not in fields)
            if unknown or "name" not in value:
                raise ValueError(f"findings: wanted a dict with name and any of {list(fields)[1:]}, got {dict(value)}")
            return Finding(**{k: v.item() if isinstance(v, np.generic) else v for k, v in value.items()})
        raise TypeError(f"findings: wanted names, Findings or dicts, got {type(value).__name__}")

    def as_dict(self) -> dict[str, object]:
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass
class Scene:
    """The half-painted phantom that diseases draw into."""

    canvas: Canvas
    anatomy: Anatomy
    lungs: Array  # signed distance of the pleural spaces, mm
    alpha: Array  # opacity of the lungs
    present: tuple[Finding, ...]
    rng: np.random.Generator
    trees: dict[tuple[int, str], tuple[Tree, Tree]]  # (side, lobe) -> arteries with bronchi, veins

    # side -> function of (x, y, z, lungs) that gives the distance above the surface of the pleural fluid
    fluid: dict[int, Callable[[Array, Array, Array, Array], Array]] = field(default_factory=dict)

    def room(self, box: Box = ALL) -> Array:
        """Opacity with which what replaces lung is painted. Voxels that are only partly lung count in full: their
        share of air must go too, or a dark rim stays around fluid."""
        return np.minimum(self.alpha[box] * np.float32(5), 1)

    @cached_property
    def points(self) -> dict[int, Array]:
        """Points inside each lung, independent of the grid: what is placed or measured with them is the same patient
        at every resolution."""
        return {side: self.anatomy.lung_points(side, POINTS, self.rng) for side in (1, -1)}

    def above_fluid(self, side: int, points: Array) -> Array:
        """Distance (mm) of points (N, 3) above the pleural fluid of that side; large where there is none."""
        if side not in self.fluid:
            return np.full(len(points), 999.0, np.float32)
        x, y, z = points.T
        return self.fluid[side](x, y, z, self.anatomy.lungs(x, y, z))

    def lobe_points(self, f: Finding, side: int, depth: float = 0.0) -> Array:
        """Points of the finding's lobe at least `depth` mm inside the lung and clear of pleural fluid, if there are."""
        points = self.points[side]
        x, y, z = points.T
        deep = self.anatomy.lungs(x, y, z) < -depth
        dry = self.above_fluid(side, points) > depth
        lobe = self.anatomy.lobe(x, y, z)[f.lobe] < -0.5 * depth if f.lobe else np.ones(len(points), bool)
        for keep in (deep & dry & lobe, deep & lobe, deep & dry, deep):
            if keep.sum() >= 3:
                return points[keep]
        return points


class Disease:
    """One kind of finding: what may be said about it, how it changes the anatomy, how it is drawn.

    A new one is a subclass here, an entry in `FINDINGS`, and its phrases in `report.PHRASES`.
    """

    name: str
    label: str  # the CT-RATE name
    layer: int = 0  # drawing order
    sides: dict[str, float] = {}  # allowed values and how often they are drawn
    lobes: dict[str, float] = {}
    sizes: dict[str, float] = {}
    kinds: dict[str, float] = {}

    def fill(self, f: Finding, rng: np.random.Generator, others: list[Finding]) -> Finding:
        """Check what was asked for and draw the rest. Raises ValueError."""
        drawn: dict[str, str | None] = {}
        for key, allowed in (("side", self.sides), ("lobe", self.lobes), ("size", self.sizes), ("kind", self.kinds)):
            value = getattr(f, key)
            if value is not None and value not in allowed:
                wanted = f"one of {list(allowed)}" if allowed else "nothing"
                raise ValueError(f"{key} of {self.name}: wanted {wanted}, got {value!r}")
            if value is None and allowed:
                weights = np.array(list(allowed.values()))
                value = str(rng.choice(list(allowed), p=weights / weights.sum()))
            drawn[key] = value
        if drawn["lobe"] == "middle" and drawn["side"] != "right":
            if f.lobe == "middle" and f.side is not None:
                raise ValueError(f"lobe of {self.name}: wanted 'upper' or 'lower' on the {f.side} side, got 'middle'")
            if f.lobe == "middle":
                drawn["side"] = "right"
            else:
                drawn["lobe"] = "lower"
        for key in ("size_mm", "count"):
            if getattr(f, key) is not None and self.name != "lung nodule":
                raise ValueError(f"{key} of {self.name}: wanted nothing, got {getattr(f, key)!r}")
        return replace(f, **drawn)  # type: ignore[arg-type]

    def prepare(self, anatomy: Anatomy, f: Finding, rng: np.random.Generator) -> None:
        """Change the anatomy before anything is drawn."""

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        """Draw into the scene."""


def dry_side(asked: Finding, filled: Finding, others: list[Finding]) -> Finding:
    """Move a lesion whose side is free away from a large effusion that would drown it."""
    for o in others:
        if o.name == "pleural effusion" and o.size in ("moderate", "large") and asked.side is None:
            if o.side != "bilateral":
                dry = "left" if o.side == "right" else "right"
                lobe = "upper" if filled.lobe == "middle" and dry == "left" and asked.lobe is None else filled.lobe
                if not (lobe == "middle" and dry == "left"):
                    return replace(filled, side=dry, lobe=lobe)
            elif asked.lobe is None:
                return replace(filled, lobe="upper")
    return filled
