"""Compile every launch of the Triton kernels for GPUs that need not be there, and read what came out.

    python benchmarks/aot.py [--family conv] [--arch 90] [--markdown docs/kernels-aot.md]

For each launch and architecture: registers, shared memory, spills, matrix instructions, 128-bit accesses to global
memory, by Triton's own cuobjdump and nvdisasm. Every launch in float16; of bfloat16 and float32, whose products run on
the FMA units, what EXTRA names. No driver is needed. Exit code 1 where a launch does not compile, breaks a limit, or
has no 128-bit access where its memory allows one.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions do not compile

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

FAMILIES = ("norm", "conv", "attention", "resample")
ARCHITECTURES = (80, 90, 100)
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes one block may have: CUDA C++ programming guide, table 21
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# dtype -> family -> part of the launch's name. Float32 has blocks of its own for each head dim, and one for all widths.
EXTRA = {
    torch.bfloat16: {"norm": ", 128", "conv": "128 to 128", "attention": "D=32", "resample": ", 128"},
    torch.float32: {"norm": ", 128", "conv": "128 to 128", "attention": "D=", "resample": ", 128"},
}
# What no layout allows: a merging program reads the few channels of one group; sums and statistics leave a vector of
# channels a program; rows of a bias's gradient are as long as there are keys.
NARROW = {"merge_kernel": ("load", "store"), "backward_merge_kernel": ("load", "store"), "stats_kernel": ("store",),
          "backward_sums_kernel": ("store",), "fold_kernel": ("store",), "bias_kernel": ("store",)}  # fmt: skip
COLUMNS = ("launch", "arch", "registers", "spilled B", "shared KiB", "matrix", "128-bit load", "128-bit store", "MUFU")


def tool(name: str, path: str, *options: str) -> str:
    return subprocess.run([TOOLS / name, *options, path], capture_output=True, text=True, check=True).stdout


def compiled(row: dict, arch: int):
    """triton's compiled kernel of one launch."""
    fn = row["kernel"]
    names = fn.arg_names
    source = ASTSource(
        fn=fn,
        signature={n: "constexpr" if n in row["constexprs"] else row["signature"][n] for n in names},
        constexprs={(names.index(n),): v for n, v in row["constexprs"].items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in row.get("divisible", ())},
    )
    options = {"num_warps": row["num_warps"], "num_stages": row["num_stages"]}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(row: dict, arch: int) -> dict:
    """The numbers of COLUMNS, and `problem`: what is wrong with them, or an empty string."""
    made = compiled(row, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(made.asm["cubin"])
        f.flush()
        usage, sass = tool("cuobjdump", f.name, "-res-usage"), tool("nvdisasm", f.name, "-c")
    numbers = {key: int(v) for key, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spilled = numbers["LOCAL"] + numbers["STACK"]
    count = {key: len(re.findall(rf"\b{pattern}", sass)) for key, pattern in (
        ("matrix", r"(?:HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA)\b"), ("load", r"(?:LDG|LDGSTS)\.E[\w.]*\.128|\bUTMALDG"),
        ("store", r"STG\.E[\w.]*\.128|\bUTMASTG"), ("mufu", r"MUFU\b"), ("local", r"(?:LDL|STL)\b"))}
    problem = []
    if spilled or count["local"]:
        problem.append(f"{spilled} bytes of local memory, {count['local']} accesses")
    if row["dtype"] != torch.float32 and "tl.dot" in row["kernel"].src and not re.search(rf"\b{MATRIX[arch]}", sass):
        problem.append(f"no {MATRIX[arch]}")
    for way in ("load", "store"):
        if not count[way] and way not in NARROW.get(row["kernel"].__name__, ()):
            problem.append(f"no 128-bit {way}")
    if made.metadata.shared > SHARED_LIMIT[arch]:
        problem.append(f"{made.metadata.shared} bytes of shared memory")
    return {"launch": row["name"], "arch": arch, "registers": numbers["REG"], "spilled B": spilled,
            "shared KiB": round(made.metadata.shared / 1024, 1), "matrix": count["matrix"],
            "128-bit load": count["load"], "128-bit store": count["store"], "MUFU": count["mufu"],
            "problem": "; ".join(problem)}


def rows(family: str, arch: int) -> list[dict]:
    launches = import_module(f"t2ct.kernels.{family}").launches
    found = [row | {"dtype": torch.float16} for row in launches(arch)]
    for dtype, part in EXTRA.items():
        found += [row | {"name": f"{row['name']}, {dtype}".replace("torch.", ""), "dtype": dtype}
                  for row in launches(arch, dtype) if part[family] in row["name"]]
    return found


def one(job: tuple[str, int, int]) -> dict:
    family, arch, index = job
    row = rows(family, arch)[index]
    try:
        return {"family": family} | inspect(row, arch)
    except Exception as error:  # what a compiler raises has many types; the table names it
        said = str(error).strip().splitlines() or [type(error).__name__]
        return {"family": family, "launch": row["name"], "arch": arch, "problem": f"does not compile: {said[-1]}"}


def table(results: list[dict]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " | |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += ["| " + " | ".join(str(r.get(c, "")) for c in COLUMNS) + f" | {r['problem']} |" for r in results]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append")
    parser.add_argument("--match", default="", help="only launches whose name contains this")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    jobs = [(family, arch, i) for family in args.family or FAMILIES for arch in args.arch or ARCHITECTURES
            for i, row in enumerate(rows(family, arch)) if args.match in row["name"]]
    with ProcessPoolExecutor(args.jobs) as pool:
        results = list(pool.map(one, jobs))
    text = [f"Compiled ahead of time by `python benchmarks/aot.py`, Triton {triton.__version__}; no GPU ran these.\n"]
    for family in dict.fromkeys(r["family"] for r in results):
        text.append(f"## kernels/{family}.py\n\n{table([r for r in results if r['family'] == family])}\n")
    print("\n".join(text))
    if args.markdown:
        args.markdown.write_text("# The kernels, compiled\n\n" + "\n".join(text))
    bad = [r for r in results if r["problem"]]
    print(f"{len(results)} launches, {len(bad)} with a problem")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
