"""The vocabulary of the reports. A new finding needs an entry in PHRASES, ABSENT and, if it has sizes, SIZE_WORDS."""

from t2ct.data.phantoms.words import chest, lungs
from t2ct.data.phantoms.words.normal import ABSENT, CLEAN, FILLER, PLURAL

PHRASES = {**lungs.PHRASES, **chest.PHRASES}
SIZE_WORDS = {**lungs.SIZE_WORDS, **chest.SIZE_WORDS}

__all__ = ["ABSENT", "CLEAN", "FILLER", "PHRASES", "PLURAL", "SIZE_WORDS"]
