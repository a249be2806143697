"""The VAE over volumes of any size inside a memory budget, exactly: docs/patches.md says why and how.

budget.py reads sizes; graph.py is the network as shapes; simulate.py counts what a choice of places takes; plan.py
finds the best; run.py carries it out, spool.py holds what lies outside the device; execute.py is the way in.
"""

from t2ct.stream.budget import enough_bytes, format_bytes, free_memory, parse_bytes
from t2ct.stream.execute import Budget, execute, plan_for
from t2ct.stream.graph import Graph, Node
from t2ct.stream.plan import Plan, make_plan, smallest_plan

__all__ = [
    "Budget",
    "Graph",
    "Node",
    "Plan",
    "enough_bytes",
    "execute",
    "format_bytes",
    "free_memory",
    "make_plan",
    "parse_bytes",
    "plan_for",
    "smallest_plan",
]
