"""Reports of phantoms in the style of CT-RATE: a grammar that varies wording, order, detail and denials."""

from t2ct.data.phantoms.reports.grammar import count_forms, names_known, write_report

__all__ = ["count_forms", "names_known", "write_report"]
