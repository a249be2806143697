"""A plan as a picture: bytes over the passes of a network, each as wide as its work."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw

from t2ct.data.preview import BACKGROUND, EDGE, MARGIN, MARK, MUTED, TEXT, font

SIZE = (1120, 560)
PLOT = (96, 84, 1092, 452)  # left, top, right, bottom
NARROWEST = 3  # pixels of a pass
KINDS = (  # of bytes, from the bottom up
    ("tensors kept", (86, 126, 178)),
    ("windows and reading", (98, 160, 124)),
    ("convolutions' results and weights", (186, 132, 84)),
    ("output", (140, 110, 168)),
)


def draw_plan(plan: Any, title: str, budget: int | None, format_bytes: Any) -> Image.Image:
    """The bytes in use at every pass of a `t2ct.stream.Plan`, by kind, under the budget and the predicted peak."""
    picture = Image.new("RGB", SIZE, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = PLOT
    most = 1.08 * max(plan.peak, budget if budget and budget < 3 * plan.peak else 0)
    spare = right - left - NARROWEST * len(plan.passes)
    draw.text((MARGIN, 34), title, TEXT, font(21), anchor="lm")
    draw.text(
        (MARGIN, 62),
        f"at most {format_bytes(plan.peak)}, {plan.work:.2f}x the operations of the whole volume at "
        "once" + (f", {format_bytes(plan.spool)} in the spool" if plan.spool else ""),
        MUTED,
        font(14),
        anchor="lm",
    )

    def height(count: float) -> float:
        return bottom - (bottom - top) * count / most

    x = float(left)
    for p, step in enumerate(plan.passes):
        end = x + NARROWEST + spare * step.flops / plan.flops
        base = 0
        for (_, color), count in zip(KINDS, _by_kind(plan, p), strict=True):
            draw.rectangle((x, height(base + count), end - 1, height(base)), fill=color)
            base += count
        if end - x > 16:  # a name where there is room for one
            name = Image.new("L", (150, 16))
            ImageDraw.Draw(name).text((150, 8), plan.label(step.node).split(".", 1)[-1], 255, font(12), anchor="rm")
            turned = name.rotate(60, expand=True)
            picture.paste(MUTED, (int((x + end) / 2) - turned.width + 8, bottom + 6), turned)
        x = end
    for count, color, what in ((plan.peak, MARK, "predicted peak"), (budget or 0, TEXT, "budget")):
        if 0 < count <= most:
            draw.line((left, height(count), right, height(count)), color)
            draw.text((right, height(count) - 4), f"{what} {format_bytes(count)}", color, font(12), anchor="rs")
    for i in range(5):
        draw.text((left - 8, height(most * i / 4)), format_bytes(most * i / 4), MUTED, font(12), anchor="rm")
    draw.rectangle((left, top, right, bottom), outline=EDGE)
    at = MARGIN
    for kind, color in KINDS:
        draw.rectangle((at, SIZE[1] - 22, at + 11, SIZE[1] - 11), fill=color)
        draw.text((at + 18, SIZE[1] - 16), kind, TEXT, font(13), anchor="lm")
        at += 40 + int(font(13).getlength(kind))
    return picture


def _by_kind(plan: Any, p: int) -> tuple[int, int, int, int]:
    live = [b for b in plan.buffers if b.first <= p <= b.last]
    kept = sum(b.bytes for b in live if b.key[1] == "node")
    return kept, sum(b.bytes for b in live) - kept, plan.passes[p].outside, plan.output
