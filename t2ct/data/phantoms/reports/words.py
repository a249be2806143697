"""The vocabulary of the reports. A new finding needs an entry in PHRASES, ABSENT and, if it has sizes, SIZE_WORDS."""

from t2ct.data.phantoms.reports import chest, lungs
from t2ct.data.phantoms.reports.normal import ABSENT, CLEAN, NORMAL, PLURAL

PHRASES = {**lungs.PHRASES, **chest.PHRASES}
SIZE_WORDS = {**lungs.SIZE_WORDS, **chest.SIZE_WORDS}

__all__ = ["ABSENT", "CLEAN", "NORMAL", "PHRASES", "PLURAL", "SIZE_WORDS"]
