"""How a block's chain is planned: by chip, channels and size; what the model says about each and what the docs say."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from t2ct.kernels import block_plan, plan
from t2ct.kernels.block_plan import forward, forward_seconds, gradient
from t2ct.kernels.chips import CHIPS, Work, chip_of

from t2ct.ops.explain import PLANNED_SIZES, explain, plan_rows

HALF = torch.float16
SIZES = [8 * 4**i for i in range(14)]  # voxels
WIDTHS = (64, 128, 256, 512)
each_chip = pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)


@each_chip
@pytest.mark.parametrize("c", WIDTHS)
def test_monotone_in_size(chip, c):
    """A prologue saves a launch and a pass; with more voxels the launch counts for less and less."""
    ways = [forward(chip, HALF, voxels, c, c, False)[0] for voxels in SIZES]
    assert ways == sorted(ways, reverse=True), "a larger volume went back to the prologue"
    seconds = [forward_seconds(chip, HALF, voxels, c, c, way) for way in ("apply", "prologue") for voxels in SIZES]
    for row in (seconds[: len(SIZES)], seconds[len(SIZES) :]):
        assert all(0 < a <= b for a, b in zip(row, row[1:], strict=False))


@each_chip
@pytest.mark.parametrize("c", WIDTHS)
@pytest.mark.parametrize("voxels", (4096, 524288))
def test_monotone_in_the_chip(chip, c, voxels):
    """Slower memory, more special functions hidden: each is for the prologue, never against it."""

    def ways(changes):
        chips = [replace(chip, **change) for change in changes]
        return [forward(other, HALF, voxels, c, c, False)[0] for other in chips]

    by_memory = ways([{"bytes": chip.bytes / 2**i} for i in range(8)])
    by_hiding = ways([{"hidden": i / 8} for i in range(9)])
    assert by_memory == sorted(by_memory) and by_memory[-1] == "prologue"
    assert by_hiding == sorted(by_hiding) and by_hiding[0] == "apply"


def test_what_the_model_counts():
    """By hand: 64 to 64 channels of a 128^3 volume in blocks of 128 x 64 on H200."""
    chip, voxels = CHIPS[90], 128**3
    at = plan.launch(90, HALF, 64, 64)
    assert (at.bm, at.bn) == (128, 64)
    work = block_plan.conv_work(at, voxels, 64, 64, HALF, prologue=True)
    assert work.flops == 2 * 27 * 64 * 64 * voxels and work.exps == 2 * 27 * 64 * voxels
    assert work.bytes == 2 * (128 * voxels + 27 * 64 * 64)
    assert work.l2 == 27 * 64 * 2 * (128 + 64) * voxels / 128
    assert work.bound(chip) == "exp" and Work(work.bytes, work.flops, 0, work.l2).bound(chip) == "L2"
    # special functions to products: 128 k / BN of the peak that counts 4096 operations a clock and multiprocessor
    peak = replace(chip, flops=4096 * chip.sms * chip.clock)
    for bn, c in ((64, 64), (128, 128), (256, 256)):
        work = block_plan.conv_work(replace(at, bn=bn), voxels, c, c, HALF, prologue=True)
        assert work.times(peak)["exp"] / work.times(peak)["matrix"] == pytest.approx(128 * 2 / bn)


def test_choices():
    """As the docs say: one pass on data-centre chips at the sizes that take time, the prologue on consumer chips for
    few channels, where memory is slow and special functions are not."""
    large = 512 * 512 * 128
    for arch in (80, 90, 100):
        assert [forward(CHIPS[arch], HALF, large, c, c, True)[0] for c in WIDTHS] == ["apply"] * 4
    assert forward(CHIPS[89], HALF, 128 * 128 * 32, 64, 64, True) == ("prologue", True)
    assert forward(CHIPS[89], HALF, large, 512, 512, True) == ("apply", True)
    for arch in CHIPS:  # float32 products run on the units that the arithmetic wants: nothing hides
        assert forward(CHIPS[arch], torch.float32, large, 64, 64, False)[0] == "apply"
    # an epilogue's 128 columns double the traffic of 256; elsewhere it is free
    assert [forward(CHIPS[90], HALF, large, c, c, True)[1] for c in WIDTHS] == [True, True, False, False]
    assert [gradient(CHIPS[90], HALF, large, c, c) for c in WIDTHS] == [True, True, False, False]
    assert all(gradient(CHIPS[arch], HALF, large, c, c) for arch in (80, 89, 100) for c in WIDTHS)


def test_not_asked_for_statistics():
    assert all(forward(chip, HALF, 4096, 64, 64, False)[1] is False for chip in CHIPS.values())


def test_chip_of_this_machine():
    assert chip_of(torch.device("cpu")) is CHIPS[80]


def test_explain_shows_the_plan():
    rows = plan_rows()
    assert {row[0] for row in rows} == {f"sm_{arch} ({chip.name})" for arch, chip in CHIPS.items()}
    assert len(rows) == len(CHIPS) * len(PLANNED_SIZES)
    text = explain("cpu")
    for row in rows:
        assert all(cell in text for cell in row)
    for (arch, chip), size in ((a, s) for a in CHIPS.items() for s in PLANNED_SIZES):
        row = next(r for r in rows if r[0] == f"sm_{arch} ({chip.name})" and r[1] == " x ".join(map(str, size)))
        for c, cell in zip(WIDTHS, row[2:], strict=True):
            assert cell.startswith(forward(chip, HALF, size[0] * size[1] * size[2], c, c, True)[0])


def test_the_docs_say_the_same():
    """docs/kernels.md holds the table that `t2ct explain` prints."""
    page = (Path(__file__).parent.parent / "docs/kernels.md").read_text()
    for row in plan_rows():
        assert re.search(r"\| *" + r" *\| *".join(map(re.escape, row)) + r" *\|", page), row
