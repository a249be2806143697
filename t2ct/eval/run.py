"""`evaluate` and `compare`: open and check everything, say what it costs, see, compute, write."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from t2ct import __version__
from t2ct.checks import find_device, model_folder
from t2ct.eval import tables as tb
from t2ct.eval.bench import FULL, QUICK, Bench, Settings, System
from t2ct.eval.look import Backbone, Clip, Look, open_clip, open_judge
from t2ct.eval.make import Maker
from t2ct.eval.metrics.estimate import Estimate
from t2ct.eval.page import pictures, summary, write_page
from t2ct.eval.sets import Part, Sets, matched, open_sets, open_volumes
from t2ct.eval.store import REPORT, RESULTS, Seen
from t2ct.files import write_files
from t2ct.train.data.source import fingerprint

FORMAT = "t2ct-eval-1"
DATA = "phantoms:500"
COMPARED = ("fidelity", "factual", "alignment", "utility", "memorisation")


def evaluate(
    out: str | Path,
    model: Any = None,
    *,
    data: str | Path = DATA,
    quick: bool = False,
    judge: str | Path | None = None,
    clip: str | Path | None = None,
    backbones: Sequence[str] = (),
    tables: Sequence[str] = tb.TABLES,
    without_contrastive: Any = None,
    relearn: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    count: int | None = None,
    batch: int | None = None,
    known: int | None = None,
    skip_bad: bool = False,
    device: str | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Rerun the tables of Molino et al. 2025 (arXiv 2506.00633) for a model, and leave them in `out`.

    out       results.json, report.html, the generated volumes, what was seen of all volumes
    model     as `T2CTPipeline.from_pretrained` takes it, a pipeline, or a folder of volumes that any system made from
              the data's reports, named as the data's volumes
    data      "phantoms:N", or a folder with manifest.csv or shaped as CT-RATE (`t2ct.eval.sets.open_sets`)
    quick     few volumes, few steps: minutes on a CPU
    judge     a judge's file, folder or run; default: that in the model's folder, else the package's
    clip      a CLIP3D with both towers, for alignment: a run or folder; default: the model's, if it has both
    backbones "PATH:factory": networks whose features the distances use instead of the judge's (`Backbone`)
    tables    some of fidelity, factual, alignment, ablation, utility, memorisation
    without_contrastive  a second model, whose text tower was not trained contrastively, for the ablation
    relearn   updates of each of three classifiers trained for the utility table from nothing; 0: a linear probe of the
              judge's features, which is quick but looks through a network that real labels have trained
    steps, guidance, count, batch  sampling steps, guidance scale, reports at most, volumes generated at once
    known     training volumes at most that memorisation looks among; default 2000, quick 64
    skip_bad  read all volumes of `data` first, and leave out what cannot be used; left_out.txt names it
    resume    go on with the evaluation in `out`
    Returns the content of results.json. Before long work starts tables, headers and networks are checked, and a few
    volumes read: FileNotFoundError, ValueError, FileExistsError name what was wanted and what came.
    """
    models = {"made": model, **({"without contrastive": without_contrastive} if without_contrastive else {})}
    options = Options(
        str(data), judge, clip, tuple(backbones), tuple(tables), steps, guidance, count, batch, known, skip_bad,
        device, resume, quiet,
    )  # fmt: skip
    bench = _bench(out, models, options, replace(QUICK if quick else FULL, relearnt=relearn))
    system = bench.systems[0]
    if not quiet:
        print(f"evaluation of {system.told} by {bench.count} reports of {data}")
        bench.print_cost()
    bench.see()
    results = _head(bench, {"model": system.told, "data": str(data)}) | bench.compute(system)
    if len(bench.systems) > 1:
        real = bench.store.all("real", bench.count)
        results.setdefault("ablation", {})["contrastive"] = differences(bench, real, bench.systems[1], system)
    return _finish(bench, results, system)


def compare(
    a: Any,
    b: Any,
    out: str | Path,
    *,
    data: str | Path | None = None,
    quick: bool = False,
    judge: str | Path | None = None,
    clip: str | Path | None = None,
    backbones: Sequence[str] = (),
    tables: Sequence[str] = COMPARED,
    steps: int | None = None,
    guidance: float | None = None,
    count: int | None = None,
    batch: int | None = None,
    known: int | None = None,
    skip_bad: bool = False,
    device: str | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Two models, or folders of volumes, side by side on the same reports; arguments as of `evaluate`.

    data: default: none if both are folders of volumes: then `a` is what `b` is measured against, reports and labels
    come from the folders' own tables, if they have any, and only fidelity and factual correctness are computed, of the
    first `count` volumes. Models are of one size; volumes of others are stretched to it.
    Returns the content of results.json: "a", "b" with their tables and "difference" (b minus a).
    """
    if data is None and _is_volumes(a) and _is_volumes(b):
        from t2ct.eval.folders import compare_folders

        given: dict[str, Any] = {"quick": quick or None, "clip": clip, "steps": steps, "guidance": guidance}
        given |= {"batch": batch, "known": known, "skip_bad": skip_bad or None}
        given |= {"tables": None if tuple(tables) == COMPARED else tables}
        if said := [f"{name}={value!r}" for name, value in given.items() if value is not None]:
            raise ValueError(f"data: wanted what A and B were made from, since {said[0]} has no say without, got none")
        return compare_folders(
            a, b, out, judge=judge, backbones=backbones, count=count, device=device, resume=resume, quiet=quiet
        )
    options = Options(
        str(data or DATA), judge, clip, tuple(backbones), tuple(tables), steps, guidance, count, batch, known, skip_bad,
        device, resume, quiet,
    )  # fmt: skip
    bench = _bench(out, {"a": a, "b": b}, options, QUICK if quick else FULL)
    first, second = bench.systems
    if not quiet:
        print(f"{first.told} and {second.told} by {bench.count} reports of {data or DATA}")
        bench.print_cost()
    bench.see()
    results = _head(bench, {"a_is": first.told, "b_is": second.told, "data": str(data or DATA)})
    results |= {"a": bench.compute(first), "b": bench.compute(second)}
    results["difference"] = differences(bench, bench.store.all("real", bench.count), first, second)
    return _finish(bench, results, second)


def differences(bench: Bench, real: Seen, first: System, second: System) -> dict[str, Any]:
    """What the second system has more than the first, on the same reports."""
    a, b = bench.main(first), bench.main(second)
    found: dict[str, Any] = {}
    if bench.labels is not None and tb.measurable(bench.labels):
        for name, seen in (("first", a), ("second", b)):
            found[f"auc_macro_{name}"] = tb.fa.averaged(tb.fa.aucs, tb.probabilities(seen), bench.labels)[0]
        found["auc_macro"] = tb.difference(tb.fa.aucs, tb.probabilities(b), tb.probabilities(a), bench.labels)
    if bench.count >= tb.NEEDS["fidelity"]:
        found |= tb.nearer(real, a, b)
    return found


@dataclass(frozen=True)
class Options:
    """What `evaluate` and `compare` are both told."""

    data: str
    judge: Any
    clip: Any
    backbones: tuple[str, ...]
    tables: tuple[str, ...]
    steps: int | None
    guidance: float | None
    count: int | None
    batch: int | None
    known: int | None
    skip_bad: bool
    device: str | None
    resume: bool
    quiet: bool


def _bench(out: str | Path, models: dict[str, Any], o: Options, settings: Settings) -> Bench:
    """Open and check everything."""
    wrong = [name for name in o.tables if name not in tb.TABLES]
    if wrong or not o.tables:
        raise ValueError(f"tables: wanted some of {', '.join(tb.TABLES)}, got {', '.join(o.tables) or 'none'}")
    where = find_device(o.device)
    given: dict[str, Any] = {"steps": o.steps, "guidance": o.guidance, "count": o.count, "known": o.known}
    settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
    models = {name: _final(model) for name, model in models.items()}
    folder = next((m for m in models.values() if not _is_volumes(m) and not hasattr(m, "vae")), None)
    own, judge_hash = open_judge(o.judge, folder, where, o.data.startswith("phantoms:"))
    opened = {name: _open_model(model, where) for name, model in models.items()}
    pipes = [pipe for pipe in opened.values() if not isinstance(pipe, Path)]
    size = tuple(pipes[0].size) if pipes else None
    volumes: dict[str, Any] = {n: open_volumes(path, size) for n, path in opened.items() if isinstance(path, Path)}
    size = size or next(iter(volumes.values())).size
    if any(tuple(pipe.size) != size for pipe in pipes):
        raise ValueError(f"models: wanted volumes of one size, got {' and '.join(str(pipe.size) for pipe in pipes)}")
    nets = [Backbone(spec, size, where) for spec in o.backbones]
    eyes = open_clip(folder, o.clip, where) if "alignment" in o.tables else "it was not asked for"
    sets = open_sets(o.data, size, settings.count, settings.known, o.skip_bad)
    if told := sets.known_to_judges:
        sets.notices.append(f"judge: {told}")
        warnings.warn(sets.notices[-1], stacklevel=3)
    _match(sets, volumes)
    prompts = [sets.test.entries[i].texts[0] for i in range(len(sets.test))]
    systems = []
    for name, one in opened.items():
        if isinstance(one, Path):
            systems.append(System(name, str(one), None, volumes[name], {"volumes": fingerprint(volumes[name])}))
        else:
            told = one.name if len(opened) == 1 else f"{one.name} ({name})"
            facts = {"model": one.name, "weights": one.weights_hash}
            systems.append(System(name.replace(" ", "-"), told, Maker(one, prompts, o.batch), None, facts))
    look = Look(own, eyes if isinstance(eyes, Clip) else None, nets, where)
    facts = {
        "format": FORMAT, "data": o.data, "judge": judge_hash, "clip": eyes.hash if isinstance(eyes, Clip) else None,
        "backbones": {f"{net.dims}d": f"{net.spec} {net.hash}" for net in nets},
    }  # fmt: skip
    reasons = {"alignment": eyes} if isinstance(eyes, str) else {}
    return Bench(out, sets, systems, look, settings, o.tables, facts, reasons, o.resume, o.quiet)


def _match(sets: Sets, volumes: dict[str, Any]) -> None:
    """Keep the reports that every folder of volumes has a volume of, and of these the volumes, in one order."""
    maps: dict[str, dict[int, int]] = {}
    for name, folder in volumes.items():
        ours, theirs, told = matched(sets.test, folder)
        maps[name] = dict(zip(ours, theirs, strict=True))
        if told:
            sets.notices.append(told)
    if maps:
        common = sorted(set.intersection(*(set(m) for m in maps.values())))
        sets.test = Part(sets.test, common)
        for name, m in maps.items():
            volumes[name] = Part(volumes[name], [m[i] for i in common])


def _open_model(model: Any, device: Any) -> Any:
    """A pipeline, or the path of a folder of volumes."""
    if _is_volumes(model):
        return Path(model)
    if hasattr(model, "estimate_seconds"):
        return model
    from t2ct.pipeline import T2CTPipeline

    return T2CTPipeline.from_pretrained(model, device=device)


def _final(model: Any) -> Any:
    """Of a run the weights that it left, of a name its folder."""
    return model_folder(model) if isinstance(model, (str, Path)) else model


def _is_volumes(model: Any) -> bool:
    model = _final(model)
    return isinstance(model, (str, Path)) and Path(model).is_dir() and not (Path(model) / "config.json").is_file()


def _head(bench: Bench, told: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT, **told, "version": __version__, "date": date.today().isoformat(), "n": bench.count,
        "settings": asdict(bench.settings), "facts": bench.facts, "notes": bench.notes,
    }  # fmt: skip


def plain(value: Any) -> Any:
    """Figures as JSON holds them."""
    if isinstance(value, Estimate):
        return value.as_dict()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _finish(bench: Bench, results: dict[str, Any], system: System) -> dict[str, Any]:
    """Write results.json and report.html, print the tables."""
    content = plain(results)
    return publish(bench.out, content, pictures(bench, system, content), bench.quiet)


def publish(out: Path, content: dict[str, Any], shown: dict[str, bytes], quiet: bool) -> dict[str, Any]:
    """Write the results and the page together; print the tables."""
    write_files({
        out / RESULTS: (json.dumps(content, indent=2, allow_nan=False) + "\n").encode(),
        out / REPORT: write_page(content, shown).encode(),
    })  # fmt: skip
    if not quiet:
        print(summary(content))
        print(f"wrote {out / RESULTS} and {out / REPORT}")
    return content
