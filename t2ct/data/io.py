"""NIfTI files ↔ `Volume`: any orientation in, RAS out, Hounsfield units and mm on both sides."""

from __future__ import annotations

import gzip
import json
import math
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from t2ct.data.volume import NIFTI_SUFFIXES, Volume
from t2ct.files import PathLike, check_outputs, write_files

SYNTHETIC = "SYNTHETIC t2ct"
NOTICE = "SYNTHETIC: not a scan of a person, not for diagnosis"
LONGEST_AXIS = 2**15 - 1  # the header counts in int16
MM_PER_UNIT = {"mm": 1.0, "meter": 1000.0, "micron": 0.001, "unknown": 1.0}


def load_volume(path: PathLike) -> Volume:
    """Read a NIfTI file (.nii, .nii.gz) as a `Volume`.

    The file's slope and intercept are applied, values are rounded and clipped to int16 HU, axes are permuted and
    flipped to those closest to RAS (no resampling: an oblique affine stays oblique), and lengths become mm. For a file
    that this library wrote, prompt, seed and provenance come from the JSON beside it; for any other, `volume.synthetic`
    is False.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not NIfTI, truncated, not 3-D (4-D included, whatever the length of the last axis), empty, colour,
            not finite, or an affine that is singular or not finite.
    """
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    path = Path(path)
    content = _read(path)
    if content[344:347] == b"n+1":
        kind: Any = nib.Nifti1Image
    elif content[4:7] == b"n+2":
        kind = nib.Nifti2Image
    else:
        raise ValueError(f"{path}: wanted a NIfTI file (.nii, .nii.gz), got one without the signature of NIfTI")
    try:
        image = kind.from_bytes(content)
    except (ImageFileError, HeaderDataError, WrapStructError, OSError, EOFError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path}: wanted a NIfTI file, got a header that makes no sense ({_one_line(error)})"
        ) from error

    header = image.header
    if len(image.shape) != 3 or min(image.shape) < 1:
        raise ValueError(f"{path}: wanted a 3-D volume with at least one voxel, got shape {image.shape}")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ValueError(f"{path}: wanted one real number per voxel, got {dtype} (colour or complex)")
    # Counted before anything is read: the reader would take room for all that a header claims, be it terabytes.
    wanted, held = math.prod(map(int, image.shape)) * dtype.itemsize, len(content) - int(image.dataobj.offset)
    if held < wanted:
        raise ValueError(
            f"{path}: wanted a whole NIfTI file, got one truncated or damaged: {max(held, 0)} bytes for a volume of "
            f"shape {image.shape}, which takes {wanted}"
        )
    if not np.isfinite(image.affine).all() or np.linalg.matrix_rank(image.affine[:3, :3]) < 3:
        raise ValueError(f"{path}: wanted a finite, invertible affine, got {image.affine[:3].tolist()}")
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        warnings.warn(
            f"{path}: stores no orientation (sform and qform codes are 0); left and right are a guess", stacklevel=2
        )

    try:
        image = nib.as_closest_canonical(image)
        hu = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path}: wanted a whole NIfTI file, got one truncated or damaged ({_one_line(error)})"
        ) from error
    try:
        unit = header.get_xyzt_units()[0]
    except KeyError as error:
        raise ValueError(f"{path}: wanted xyzt_units of the NIfTI standard, got {header['xyzt_units']}") from error
    scale = MM_PER_UNIT.get(unit, 1.0)
    affine = np.diag([scale, scale, scale, 1.0]) @ image.affine
    prompt, seed, provenance = _read_sidecar(path, header["descrip"].item())
    try:
        return Volume(hu, affine, prompt, seed, provenance)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path}: wanted a NIfTI file, got a folder")
    if not path.exists():
        raise FileNotFoundError(f"{path}: wanted a NIfTI file, got no such file")
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    # Unpacked to the very end, where gzip keeps its checksum: a reader that stops after the last voxel takes damaged
    # files for whole ones.
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: wanted a whole NIfTI file, got a damaged gzip ({_one_line(error)})") from error


def save_volume(volume: Volume, path: PathLike) -> Path:
    """Write `volume` to `path` (.nii.gz or .nii) and its JSON beside it, both whole or neither, replacing what exists.

    Raises ValueError for another suffix or provenance that JSON cannot hold, OSError where the folder cannot be
    written.
    """
    files = volume_files(volume, path)
    check_outputs(files)
    write_files(files)
    return Path(path)


def volume_files(volume: Volume, path: PathLike) -> dict[PathLike, bytes]:
    """What `save_volume` writes, as path → content: NIfTI and JSON. The same volume gives the same bytes."""
    return {
        sidecar_path(path): _sidecar(volume),
        Path(path): encode_nifti(volume.hu, volume.affine, path, _description(volume)),
    }


def encode_nifti(voxels: np.ndarray, affine: np.ndarray, path: PathLike, description: str = "") -> bytes:
    """The bytes of a NIfTI-1 file named `path`, gzipped for .nii.gz: (X, Y, Z) `voxels` in their own dtype, in mm.

    sform and qform are both set, with the code "scanner".
    """
    import nibabel as nib

    sidecar_path(path)  # refuses other suffixes
    if max(voxels.shape) > LONGEST_AXIS:
        raise ValueError(f"{path}: wanted at most {LONGEST_AXIS} voxels along an axis of NIfTI-1, got {voxels.shape}")
    # An explicit dtype, because nibabel refuses to guess for int64 and would scale floats otherwise.
    image = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    # An oblique, sheared affine cannot be held by a qform; nibabel then stores the closest rotation there, and readers
    # prefer the sform.
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner", strip_shears=True)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = description.encode("ascii", "replace")[:79]
    content = image.to_bytes()
    # Without a time stamp the same volume is the same file.
    return gzip.compress(content, compresslevel=4, mtime=0) if str(path).lower().endswith(".gz") else content


def sidecar_path(path: PathLike, suffix: str = ".json") -> Path:
    """`ct.nii.gz` → `ct.json` (or another `suffix`). Raises ValueError for a name not in .nii.gz or .nii."""
    path = Path(path)
    for ending in NIFTI_SUFFIXES:
        if path.name.lower().endswith(ending) and len(path.name) > len(ending):
            return path.with_name(path.name[: -len(ending)] + suffix)
    raise ValueError(f"path: wanted a name that ends in .nii.gz or .nii, got {str(path)!r}")


def _description(volume: Volume) -> str:
    version = volume.provenance.get("version") or library_version()
    return f"{SYNTHETIC} {version}" if volume.synthetic else f"t2ct {version}"


def _sidecar(volume: Volume) -> bytes:
    head: dict[str, Any] = {"synthetic": volume.synthetic}
    if volume.synthetic:
        head["notice"] = NOTICE
    head |= {"prompt": volume.prompt, "seed": None if volume.seed is None else int(volume.seed)}
    derived = {"shape": volume.shape, "spacing_mm": volume.spacing, "unit": "HU"}
    # `head` twice: first for its place at the top, again so that no provenance can stand in for the prompt.
    content = head | {"version": library_version()} | volume.provenance | head | derived
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"provenance: wanted values that JSON can hold, got {_one_line(error)}") from error
    # Text from a command line may hold lone surrogates, which UTF-8 cannot; backslashreplace writes them as JSON's own
    # escapes.
    return (text + "\n").encode("utf-8", "backslashreplace")


def _read_sidecar(path: Path, description: bytes) -> tuple[str | None, int | None, dict[str, Any]]:
    """Prompt, seed and provenance of the volume at `path`, whose header says `description`."""
    if not description.startswith(SYNTHETIC.encode()):
        return None, None, {"synthetic": False, "source": path.name}
    sidecar = sidecar_path(path)
    if not sidecar.exists():
        return None, None, {}
    try:
        content = json.loads(sidecar.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except ValueError as error:
        raise ValueError(
            f"{sidecar}: wanted the JSON object written beside {path.name}, got {_one_line(error)}"
        ) from error
    prompt, seed = content.pop("prompt", None), content.pop("seed", None)
    for derived in ("synthetic", "notice", "shape", "spacing_mm", "unit"):
        content.pop(derived, None)
    return prompt, seed, content


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def library_version() -> str:
    """The version of t2ct that writes the file."""
    import t2ct

    return str(getattr(t2ct, "__version__", "unknown"))
