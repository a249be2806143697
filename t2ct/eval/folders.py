"""Two folders of volumes, made by any systems or scanners, with nothing else: how far apart are they?"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from t2ct import __version__
from t2ct.checks import find_device
from t2ct.eval import tables as tb
from t2ct.eval.look import Backbone, Look, open_judge
from t2ct.eval.make import see
from t2ct.eval.sets import labels_of, open_volumes
from t2ct.eval.store import Store
from t2ct.train.data.source import fingerprint


def compare_folders(
    a: str | Path, b: str | Path, out: str | Path, *, judge: str | Path | None = None, backbones: Sequence[str] = (),
    count: int | None = None, device: str | None = None, resume: bool = False, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Fidelity of the volumes in `b` against those in `a`, and factual correctness of each that has labels.

    Called by `t2ct.eval.compare`, which see. Raises ValueError for fewer volumes than a distance needs.
    """
    from t2ct.eval.run import FORMAT, plain, publish

    where = find_device(device)
    own, judge_hash = open_judge(judge, None, where, phantoms=False)
    first = open_volumes(a, count=count)
    sides = {"a": first, "b": open_volumes(b, first.size, count)}
    least = tb.NEEDS["fidelity"]
    for name, volumes in sides.items():
        if len(volumes) < least:
            raise ValueError(f"{name}: wanted at least {least} volumes for fidelity, got {len(volumes)}")
    labels = {name: labels_of(volumes, name) for name, volumes in sides.items()}
    nets = [Backbone(spec, first.size, where) for spec in backbones]
    look = Look(own, None, nets, where)
    facts: dict[str, Any] = {"format": FORMAT, "judge": judge_hash}
    facts["backbones"] = {f"{net.dims}d": f"{net.spec} {net.hash}" for net in nets}
    facts |= {name: fingerprint(volumes) for name, volumes in sides.items()}
    store = Store(out, facts | {"version": __version__}, resume)
    empty = np.full(first.size, -1000, np.int16)
    look(empty)
    start = time.perf_counter()
    look(empty)
    looking = time.perf_counter() - start
    start = time.perf_counter()
    first.read(0)
    each, total = looking + time.perf_counter() - start, sum(map(len, sides.values()))
    if not quiet:
        print(f"{total} volumes of {each:.2f} s: about {1 + total * each / 60:.0f} min in all", flush=True)
    for name, volumes in sides.items():
        with tqdm(total=len(volumes), desc=f"volumes of {name}", unit="volume", disable=quiet) as bar:
            see(store, name, volumes, look, True, bar.update)
    seen = {name: store.all(name, len(volumes)) for name, volumes in sides.items()}
    notes: list[str] = []
    results: dict[str, Any] = {
        "format": FORMAT, "a_is": str(a), "b_is": str(b), "version": __version__, "date": date.today().isoformat(),
        "n": min(map(len, sides.values())), "facts": facts, "notes": notes,
        "fidelity": tb.fidelity(seen["a"], seen["b"], paired=False),
    }  # fmt: skip
    for name, told in labels.items():
        if told is None or not tb.measurable(told):
            notes.append(f"factual correctness of {name} is left out: it has no labels, or no finding to tell apart")
            continue
        results[name] = {"factual": tb.factual(None, seen[name], told)}
        if gone := tb.left_out(told):
            notes.append(f"{name}: {gone}")
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return publish(Path(out), plain(results), {}, quiet)
