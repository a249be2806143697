"""How much memory a run takes, before it takes it, and how its updates are cut up to fit."""

from t2ct.train.memory.plan import Plan, make_plan, read_size, write_size
from t2ct.train.memory.recipes import checkpoint_blocks

__all__ = ["Plan", "checkpoint_blocks", "make_plan", "read_size", "write_size"]
