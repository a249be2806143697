"""What a scanner makes of the tissue: slice thickness, point spread, and noise with the spectrum of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from t2ct.data.phantoms.canvas import Array, f32

SLICES = 16  # made at once: bounds the memory of the noise


@dataclass(frozen=True)
class Kernel:
    """A scan. blur: standard deviation (mm) of the point spread in the slice. slab: of the slice profile along z (mm).
    cutoff: frequency (1/mm) where the kernel falls off. noise: standard deviation (HU) in voxels of 0.7 x 0.7 x 1.5 mm.
    """

    blur: float
    slab: float
    cutoff: float
    noise: float

    @staticmethod
    def draw(rng: np.random.Generator) -> Kernel:
        """From smooth to sharp: a sharp kernel blurs less and lets more noise through."""
        sharp = float(rng.uniform(0, 1))
        blur, slab = 1.2 - 0.6 * sharp, float(rng.uniform(1.0, 5.0))
        noise = (14 + 28 * sharp) * float(rng.uniform(0.8, 1.3)) / np.sqrt(max(slab, 1.0) / 1.5)
        return Kernel(blur, slab / 2.355, 0.28 + 0.42 * sharp, float(noise))

    def power(self, f: Array) -> Array:
        """Noise power at spatial frequencies `f` (1/mm), without unit: the ramp of filtered back-projection times the
        square of a Gaussian apodisation (Riederer et al. 1978)."""
        return f * np.exp(-((f / np.float32(self.cutoff)) ** 2))

    def scale(self) -> float:
        """Factor that makes `power` the power spectrum (HU^2 mm^2) of slices whose 0.7 mm pixels have `noise` HU."""
        axis = np.fft.fftfreq(256, 0.7)
        u, v = np.meshgrid(axis, axis, indexing="ij")
        return self.noise**2 / float((self.power(np.hypot(u, v)) * _pixel(u, v, 0.7, 0.7)).sum() * (axis[1] ** 2))


def _pixel(u: Array, v: Array, dx: float, dy: float) -> Array:
    """What averaging over a pixel leaves of the power at (u, v)."""
    return (np.sinc(u * dx) * np.sinc(v * dy)) ** 2


def _smooth(volume: Array, axis: int, sigma: float) -> Array:
    """Three-tap smoothing by `sigma` voxels (at most one), edges repeated."""
    side = np.float32(min(0.5 * sigma * sigma, 0.25))
    if side < 0.01:
        return volume
    v = np.moveaxis(volume, axis, 0)
    out = v * (1 - 2 * side)
    out[1:] += side * v[:-1]
    out[:-1] += side * v[1:]
    out[0] += side * v[0]
    out[-1] += side * v[-1]
    return np.moveaxis(out, 0, axis)


def add_noise(hu: Array, spacing: tuple[float, float, float], kernel: Kernel, rng: np.random.Generator) -> Array:
    """Add noise of the kernel's spectrum to (X, Y, Z) float32 `hu`, in place; voxels of any size average it down.

    Drawn in the frequency domain, slice by slice. The middle of the body lets fewer photons through than its rim, the
    shoulders and the upper abdomen fewer than the chest."""
    nx, ny, nz = hu.shape
    dx, dy, dz = spacing
    u, v = np.fft.fftfreq(nx, dx)[:, None], np.fft.rfftfreq(ny, dy)[None]
    power = kernel.scale() * kernel.power(np.hypot(u, v)) * _pixel(u, v, dx, dy)
    # Slices as thick as `dz` average over the slices of 1.5 mm that `noise` is for.
    amplitude = f32(np.sqrt(power / (dx * dy) * min(1.0, 1.5 / dz) * nx * ny / 2))
    x, y, z = (np.linspace(-1, 1, n, dtype=np.float32) for n in hu.shape)
    along = 0.85 + 0.45 * z * z
    across = 1.15 - 0.4 * np.minimum(1.6 * (x[:, None] ** 2 + y[None] ** 2), 1.0)
    for first in range(0, nz, SLICES):
        count = min(SLICES, nz - first)
        spectrum = np.empty((count, nx, ny // 2 + 1), np.complex64)
        spectrum.real = rng.standard_normal(spectrum.shape, dtype=np.float32)
        spectrum.imag = rng.standard_normal(spectrum.shape, dtype=np.float32)
        spectrum *= amplitude
        grain = np.fft.irfft2(spectrum, s=(nx, ny))
        grain *= across
        grain *= along[first : first + count, None, None]
        hu[:, :, first : first + count] += grain.transpose(1, 2, 0)
    return hu


def scan(hu: Array, spacing: tuple[float, float, float], rng: np.random.Generator) -> Array:
    """(X, Y, Z) float32 HU of tissue -> int16 HU as scanned, in [-1024, 3071]."""
    kernel = Kernel.draw(rng)
    for axis, sigma in ((0, kernel.blur), (1, kernel.blur), (2, kernel.slab)):
        hu = _smooth(hu, axis, sigma / spacing[axis])
    add_noise(hu, spacing, kernel, rng)
    np.rint(hu, out=hu)
    return np.clip(hu, -1024, 3071, out=hu).astype(np.int16)
