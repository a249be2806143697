"""docs/measured.md from results files of one machine: python benchmarks/table.py benchmarks/results/NAME*.json

Where two files hold the same row, the later file's counts.
"""

import json
import sys
from pathlib import Path

# Ratios of time and of memory that were aimed at.
NETWORKS = {
    "unet-float32": (0.9, 0.8), "unet-bfloat16": (0.9, 0.8), "vae-float32": (0.88, 0.5), "vae-bfloat16": (0.7, 0.4),
    "vae 128x128x64-bfloat16": (0.65, 0.25), "vae encode-bfloat16": (0.8, 0.4),
}  # fmt: skip
STEPS = {
    "ldm-float32": (0.75, 0.5), "ldm-bfloat16": (0.75, 0.5), "vae-float32": (0.75, 0.5), "vae-bfloat16": (0.75, 0.5),
    "cached clip": (1.5, 0.25),
}  # fmt: skip
WINDOWS, WHOLE = 0.4, 1.25  # of a decode in little memory, to MONAI's windows and to our whole decode


def megabytes(n: float) -> str:
    return f"{n / 1e6:.0f} MB"


def aim(ratio: float, target: float) -> str:
    return f"{ratio:.2f} (≤ {target:g}{'' if ratio <= target else ': missed'})"


def main(*paths: str) -> None:
    contents = [json.loads(Path(path).read_text()) for path in paths]
    content = contents[-1]
    machine = content["machine_info"]
    rows = list({row["fullname"]: row for c in contents for row in c["benchmarks"]}.values())
    cpu = machine.get("cpu", {})
    print(
        f"# Measured\n\nMade by `python benchmarks/table.py {' '.join(paths)}`, "
        f"never typed. {content['datetime'][:10]}, "
        f"{cpu.get('brand_raw', machine['machine'])}, {machine['threads']} threads, "
        f"torch {machine['versions']['torch']}, MONAI {machine['versions']['monai']}. No figure here is a GPU's.\n"
    )
    wide = [Path(path).stem for path, c in zip(paths, contents, strict=True) if c["machine_info"].get("large_pages")]
    if wide:
        print(f"Torch's own tensors lay on pages of 2 MB too in {', '.join(wide)}; elsewhere as installed.\n")
    extra = {row["name"]: row["extra_info"] for row in rows}
    print("| what | measured | target |\n|---|---|---|")
    if "test_generate" in extra:
        e = extra["test_generate"]
        print(
            f"| `t2ct generate`, embedded model, 30 guided steps, all included | {e['seconds']:.1f} s, "
            f"{megabytes(e['peak_bytes'])} | ≤ 20 s, ≤ 1500 MB |"
        )
    if "test_import" in extra:
        print(f"| `import t2ct` beyond torch's own | {extra['test_import']['seconds_beyond_torch']:.3f} s | ≤ 0.2 s |")
    networks = {
        row["name"][len("test_network") :].strip("[]"): row["extra_info"]
        for row in rows
        if "time_ratio" in row["extra_info"]
    }
    if networks:
        print("\nPublished sizes, random weights. Time: the peers take turns in one process, medians. Memory: above")
        print("the loaded model, a process each.\n")
        print("| network | MONAI | t2ct | time ratio | memory MONAI | memory t2ct | memory ratio | relative error |")
        print("|---|---|---|---|---|---|---|---|")
        for name, e in networks.items():
            s, m, error = e["seconds"], e["memory"], e["error"]
            for peer in (p for p in s if p.startswith("t2ct") or p == "monai windows"):
                within = peer.removeprefix("t2ct").replace(" ", ", in ").replace("monai,", ", MONAI")
                ratios = [s[peer] / s["monai"], m[peer] / m["monai"]]
                aims = NETWORKS.get(f"{name}{within}")
                told = [f"{r:.2f}" for r in ratios] if aims is None else [*map(aim, ratios, aims)]
                print(
                    f"| {name}{within} | {s['monai']:.3f} s | {s[peer]:.3f} s | {told[0]} | {megabytes(m['monai'])} | "
                    f"{megabytes(m[peer])} | {told[1]} | {error[peer]:.1e} |"
                )
        for name, e in networks.items():
            s = e["seconds"]
            for peer in (p for p in s if p.startswith("t2ct ") and "monai windows" in s):
                within = peer.removeprefix("t2ct").replace(" ", ", in ")
                whole, windows = aim(s[peer] / s["t2ct"], WHOLE), aim(s[peer] / s["monai windows"], WINDOWS)
                print(
                    f"\n{name}{within}: {whole} of our whole decode's time, {windows} of MONAI's in windows, which are "
                    "scaled to the volume: 80 of 128 latents along X and Y."
                )
    steps = [row for row in rows if "step_ratio" in row["extra_info"]]
    if steps:
        print("\nTraining: whole steps with the optimiser's, random weights. UNet 64/128/256/512 on 1x4x16x16x8")
        print("latents; VAE and critic on a 32^3 patch; CLIP3D with small towers, its gradients cached. The other is")
        print("MONAI with torch's fused AdamW in the faster of two memory formats, or the same batch at once. A")
        print("process each, which take turns. Memory: beyond weights and gradients, where these lie there already,")
        print("and where they are made anew.\n")
        print("| step | other | t2ct | time ratio | memory, other | t2ct | ratio | made anew, other | t2ct | ratio |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for row in steps:
            e = row["extra_info"]
            other, mine = e["best_peer"], e["mine"]
            name = row["name"].removeprefix("test_step").strip("[]").removeprefix("test_").replace("_", " ")
            time, memory = STEPS[name]
            cells = [f"{e['step'][other]:.2f} s", f"{e['step'][mine]:.2f} s", aim(e["step_ratio"], time)]
            for kind, ratio in (("activations", "activation_ratio"), ("activations_anew", "activation_anew_ratio")):
                cells += [megabytes(e[kind][other]), megabytes(e[kind][mine]), aim(e[ratio], memory)]
            print(f"| {name} | {' | '.join(cells)} |")
    ops: dict[str, dict[str, dict]] = {}
    for row in rows:
        if "peer" in row["extra_info"]:
            ops.setdefault(row["group"], {})[row["extra_info"]["peer"]] = row
    if ops:
        print("\nOps, medians. Roofline: share of what a copy from memory and torch's float32 matrix product")
        print("reached in the same session; above 100 % where data stay in the cache, numbers are bfloat16 or")
        print("folding or filtering saves work.\n")
        print("| op | torch | t2ct | ratio | roofline | relative error |\n|---|---|---|---|---|---|")
        for name, peers in ops.items():
            if {"torch", "cpu"} <= peers.keys():
                theirs, ours = peers["torch"]["stats"]["median"], peers["cpu"]["stats"]["median"]
                info = peers["cpu"]["extra_info"]
                print(
                    f"| {name} | {theirs * 1e3:.2f} ms | {ours * 1e3:.2f} ms | {ours / theirs:.2f} | "
                    f"{info['roofline']:.0%} | {info['error']:.1e} |"
                )
    races = [row for row in rows if "race" in row["extra_info"]]
    if races:
        print("\nRaces: every form proven right, then taking turns in one run; medians, ours to the best other.\n")
        print("| op | best other | its time | t2ct | ratio |\n|---|---|---|---|---|")
        for row in races:
            e = row["extra_info"]
            other = e["race"][e["best_peer"]]
            print(
                f"| {row['group']} | {e['best_peer']} | {other * 1e3:.2f} ms | {other / e['speedup'] * 1e3:.2f} ms | "
                f"{1 / e['speedup']:.2f} |"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
