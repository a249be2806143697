"""Procedural chest CTs with an exactly known truth: `phantom(seed, findings)`."""

from t2ct.data.phantoms.findings import FINDINGS, LABELS, Finding
from t2ct.data.phantoms.organs import ORGANS, PARTS
from t2ct.data.phantoms.phantom import Phantom, describe, phantom
from t2ct.data.phantoms.reader import contradictions, read_report
from t2ct.data.phantoms.sheet import contact_sheet, finding_sheet

__all__ = [
    "FINDINGS", "LABELS", "ORGANS", "PARTS", "Finding", "Phantom", "contact_sheet", "contradictions", "describe",
    "finding_sheet", "phantom", "read_report",
]  # fmt: skip
