"""`Volume`: a CT in Hounsfield units that knows where it lies in the patient and how it was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from t2ct.files import PathLike, check_outputs, write_files

if TYPE_CHECKING:
    from PIL.Image import Image

NIFTI_SUFFIXES = (".nii.gz", ".nii")
SMALLEST_MM, LARGEST_MM = 1e-9, 1e9  # of a voxel, and of anything


@dataclass(frozen=True, eq=False, repr=False)
class Volume:
    """A CT volume.

    Args:
        hu: (X, Y, Z) Hounsfield units, kept as int16. Index 0 grows towards the patient's right, 1 anterior, 2 superior
            (RAS+). Other real dtypes are rounded and clipped to int16.
        affine: (4, 4) voxel index → RAS position in mm, kept as float64.
        prompt: the text it was made from; None for a volume that was not made from text.
        seed: seed of the noise it was made from; None if unknown.
        provenance: how it was made (`steps`, `guidance`, `weights`, `version`, …), values that JSON can hold.
            `synthetic: False` marks a volume that did not come from this library, such as a loaded scan.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """

    hu: np.ndarray
    affine: np.ndarray
    prompt: str | None = None
    seed: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise TypeError(f"prompt: wanted a str or None, got {type(self.prompt).__name__}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int | np.integer)):
            raise TypeError(f"seed: wanted an int or None, got {type(self.seed).__name__}")
        if not isinstance(self.provenance, dict):
            raise TypeError(f"provenance: wanted a dict, got {type(self.provenance).__name__}")
        object.__setattr__(self, "hu", as_hu(self.hu))
        object.__setattr__(self, "affine", as_affine(self.affine))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along (X, Y, Z)."""
        x, y, z = self.hu.shape
        return x, y, z

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along (X, Y, Z) in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @property
    def synthetic(self) -> bool:
        """Whether this library made the volume; False only for a scan loaded from elsewhere."""
        return self.provenance.get("synthetic") is not False

    def save(self, path: PathLike) -> Path:
        """Write `path` (.nii.gz or .nii) and, beside it, a .json with prompt, seed and provenance: both whole or
        neither.

        Existing files are replaced. Raises ValueError for another suffix, OSError where the folder cannot be written.
        """
        from t2ct.data.io import save_volume

        return save_volume(self, path)

    @classmethod
    def load(cls, path: PathLike) -> Volume:
        """Read NIfTI in any orientation; see `t2ct.data.load_volume`."""
        from t2ct.data.io import load_volume

        return load_volume(path)

    def preview(self, path: PathLike | None = None, *, center: tuple[float, float, float] | None = None) -> Image:
        """Draw three planes in three windows (`t2ct.data.preview.render`), written as PNG if `path` is given.

        `center` is where the planes cross, in voxel indices (x, y, z); by default the centre of the body.
        """
        from t2ct.data.preview import encode_png, render

        if path is None:
            return render(self, center=center)
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"path: wanted a name that ends in .png, got {str(path)!r}")
        check_outputs([path])
        picture = render(self, center=center)
        write_files({path: encode_png(picture)})
        return picture

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False and dtype is not None and np.dtype(dtype) != self.hu.dtype:
            raise ValueError(f"copy: wanted True or None for dtype {np.dtype(dtype)}, got False; the voxels are int16")
        return np.array(self.hu, dtype=dtype, copy=True) if copy else np.asarray(self.hu, dtype=dtype)

    def __repr__(self) -> str:
        size = "×".join(map(str, self.shape))
        spacing = "×".join(f"{value:.4g}" for value in self.spacing)
        parts = [f"{size} voxels", f"{spacing} mm", f"{self.hu.min()} to {self.hu.max()} HU"]
        if self.seed is not None:
            parts.append(f"seed {self.seed}")
        if self.prompt:
            parts.append(repr(self.prompt if len(self.prompt) <= 60 else self.prompt[:59] + "…"))
        return f"Volume({', '.join(parts)})"

    def _repr_png_(self) -> bytes:
        from t2ct.data.preview import encode_png

        return encode_png(self.preview())


def as_hu(values: Any) -> np.ndarray:
    """Validate (X, Y, Z) Hounsfield units and return them as int16, rounded and clipped; int16 comes back uncopied."""
    try:
        hu = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"hu: wanted an array, got {type(values).__name__} that makes none ({error})") from None
    if hu.dtype.kind not in "iuf":
        raise TypeError(f"hu: wanted real numbers, got dtype {hu.dtype}")
    if hu.ndim != 3 or hu.size == 0:
        raise ValueError(f"hu: wanted a volume of shape (X, Y, Z) with at least one voxel, got shape {hu.shape}")
    if np.can_cast(hu.dtype, np.int16):
        return hu.astype(np.int16, copy=False)
    if hu.dtype.kind == "f":
        unusable = np.count_nonzero(~np.isfinite(hu))
        if unusable:
            raise ValueError(f"hu: wanted finite values, got {unusable} that are NaN or infinite")
        hu = np.rint(hu, dtype=np.result_type(hu, np.float32))  # float16 cannot hold the largest int16
    limits = np.iinfo(np.int16)
    return np.clip(hu, 0 if hu.dtype.kind == "u" else limits.min, limits.max).astype(np.int16)


def as_affine(values: Any) -> np.ndarray:
    """Validate a (4, 4) voxel → RAS affine in mm whose axes point closest to RAS; return it as float64."""
    if np.iscomplexobj(values):
        raise TypeError("affine: wanted a (4, 4) array of real numbers, got complex ones")
    try:
        affine = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"affine: wanted a (4, 4) array of numbers, got {type(values).__name__} ({error})") from None
    if affine.shape != (4, 4):
        raise ValueError(f"affine: wanted shape (4, 4), got {affine.shape}")
    if not np.isfinite(affine).all():
        raise ValueError("affine: wanted finite values, got NaN or infinity")
    if not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise ValueError(f"affine: wanted the last row 0 0 0 1, got {' '.join(f'{value:g}' for value in affine[3])}")
    if np.abs(affine).max() > LARGEST_MM:  # a NIfTI header keeps it as float32
        raise ValueError(f"affine: wanted lengths up to {LARGEST_MM:g} mm, got {np.abs(affine).max():g}")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # The determinant of the unit axes is the volume they span: free of the voxel size, 1 when they are perpendicular.
    if lengths.min() < SMALLEST_MM or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-4:
        raise ValueError("affine: wanted an invertible matrix, got a singular one")
    from nibabel.orientations import aff2axcodes

    axes = "".join(map(str, aff2axcodes(affine)))
    if axes != "RAS":
        raise ValueError(f"affine: wanted axes closest to RAS, got {axes}; t2ct.data.load_volume reorients files")
    return affine
