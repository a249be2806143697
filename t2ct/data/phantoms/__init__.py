"""Procedural chest CTs with an exactly known truth: `phantom(seed, findings)`."""

from t2ct.data.phantoms.findings import FINDINGS, LABELS, Finding
from t2ct.data.phantoms.organs import ORGANS
from t2ct.data.phantoms.phantom import Phantom, describe, phantom
from t2ct.data.phantoms.sheet import contact_sheet

__all__ = ["FINDINGS", "LABELS", "ORGANS", "Finding", "Phantom", "contact_sheet", "describe", "phantom"]
