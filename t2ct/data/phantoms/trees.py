"""Bronchi, arteries and veins of the lungs: trees that fill each lobe, radii by Murray's law.

Every lobe has its own tree from the root of its bronchus. The tips are points spread evenly over the lobe, each
supplying a territory of its own size; a branch carries the flow of all tips behind it and its radius goes with the cube
root of the flow, so that r^3 of a parent is the sum of r^3 of its children (Murray 1926). An artery runs with
each bronchus; veins have their own tree, between the territories, towards the left atrium.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from t2ct.data.phantoms.canvas import Array, f32, fill_tube

# Where the bronchus of each lobe divides for the first time (side, lobe) -> mm.
BRONCHI = {
    (1, "upper"): (45.0, -30.0, 21.0), (1, "middle"): (53.0, -20.0, -26.0), (1, "lower"): (50.0, -43.0, -34.0),
    (-1, "upper"): (-52.0, -24.0, 12.0), (-1, "lower"): (-55.0, -48.0, -24.0),
}  # fmt: skip
VEINS = {
    (1, "upper"): (47.0, -12.0, 6.0), (1, "middle"): (48.0, -10.0, -20.0), (1, "lower"): (44.0, -34.0, -30.0),
    (-1, "upper"): (-54.0, -10.0, 4.0), (-1, "lower"): (-50.0, -40.0, -26.0),
}  # fmt: skip
LOBES = tuple(BRONCHI)
TIPS = 512  # ends of the arteries of a lobe; a power of two
ARTERY = 4.6  # mm, radius of an artery that supplies a lobe
LUMEN = 0.66  # radius of a bronchus by that of its artery
AIRWAY_LEVELS = 7  # bifurcations down to which bronchi are drawn; the smaller ones no scanner shows


@dataclass
class Tree:
    """Branches of one lobe. start, end: (N, 3) mm. radius: (N,) mm of the vessel. level: (N,) forks before it."""

    start: Array
    end: Array
    radius: Array
    level: Array

    def take(self, keep: Array) -> Tree:
        return Tree(self.start[keep], self.end[keep], self.radius[keep], self.level[keep])


def grow(points: Array, root: tuple[float, float, float], tips: int, trunk: float, rng: np.random.Generator) -> Tree:
    """A tree from `root` to `tips` (a power of two) of the points (N, 3); `trunk` is the radius (mm) of its root."""
    ends = points[np.arange(tips) % len(points)] + rng.normal(0, 1.5, (tips, 3)).astype(np.float32)
    flow = rng.lognormal(0.0, 0.45, tips).astype(np.float32)
    flow *= np.float32(trunk**3) / flow.sum()
    node, groups, flows = f32([root]), ends[None], flow[None]  # one node per group of tips; a level halves the groups
    start, end, radius, level = [], [], [], []
    depth = 0
    while True:
        members = groups.shape[1]
        centre = groups.mean(1)
        if members < tips:
            share = 1.0 if members == 1 else 0.3 if members > tips // 8 else 0.42
            start.append(node)
            jitter = rng.normal(0, 0.05, node.shape).astype(np.float32)
            step = np.float32(share) * (centre - node)
            node = node + step + jitter * np.sqrt((step * step).sum(1, keepdims=True))
            end.append(node)
            radius.append(np.cbrt(flows.sum(1)))
            level.append(np.full(len(node), depth, np.int16))
            depth += 1
        if members == 1:
            break
        away = groups - centre[:, None]
        rows = np.arange(len(groups))
        axis = away[rows, np.argmax((away * away).sum(2), 1)]
        order = np.argsort((away * axis[:, None]).sum(2), 1)
        groups = np.take_along_axis(groups, order[:, :, None], 1).reshape(2 * len(groups), members // 2, 3)
        flows = np.take_along_axis(flows, order, 1).reshape(len(groups), members // 2)
        node = np.repeat(node, 2, axis=0)
    return Tree(*(np.concatenate(part) for part in (start, end, radius, level)))


def slices(tree: Tree, step: float, bow: float = 0.07) -> tuple[Array, Array, Array, Array]:
    """The branches cut into short pieces: centres (N, 3), unit tangents (N, 3), lengths (N,), index of the branch (N,).

    Branches are slightly bowed, as nothing grows straight."""
    s, e = tree.start, tree.end
    way = e - s
    length = np.sqrt((way * way).sum(1))
    pieces = np.maximum(2, np.ceil(length / step).astype(int))
    which = np.repeat(np.arange(len(s)), pieces)
    t = (np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces) + 0.5) / pieces[which]
    t = t.astype(np.float32)[:, None]
    side = np.stack([way[:, 1] - way[:, 2], way[:, 2] - way[:, 0], way[:, 0] - way[:, 1]], 1) * np.float32(bow)
    centre = s[which] + way[which] * t + side[which] * (t * (1 - t) * 2)
    tangent = way[which] + side[which] * (2 - 4 * t)
    tangent /= np.maximum(np.sqrt((tangent * tangent).sum(1, keepdims=True)), np.float32(1e-3))
    return centre, tangent, (length / pieces).astype(np.float32)[which], which


def fill(tree: Tree, step: float, least: float = 0.0) -> tuple[Array, Array]:
    """Points and weights (mm^3) of the vessels of a tree with a radius of at least `least` mm."""
    centre, tangent, length, which = slices(tree if least <= 0 else tree.take(tree.radius >= least), step)
    radius = (tree.radius if least <= 0 else tree.radius[tree.radius >= least])[which]
    return fill_tube(centre, tangent, length, radius, step)


@dataclass
class Bronchi:
    """Bronchi of a lobe beside their arteries: pieces with centre (N, 3), tangent, length, and radii in mm (N,)."""

    centre: Array
    tangent: Array
    length: Array
    lumen: Array
    wall: Array
    level: Array
    artery: Array

    def tubes(self, step: float) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Points and weights of the bronchi with their walls, and of the air in them."""
        outer = fill_tube(self.centre, self.tangent, self.length, self.lumen + self.wall, step)
        return outer, fill_tube(self.centre, self.tangent, self.length, self.lumen, step)


def bronchi(
    tree: Tree,
    step: float,
    widen: Callable[[Array, Array], Array] | None = None,
    thicken: Callable[[Array, Array], Array] | None = None,
    levels: int = AIRWAY_LEVELS,
) -> Bronchi:
    """The bronchi beside the arteries of `tree`. `widen` and `thicken` map (centres (N, 3), levels (N,)) to mm added to
    the radius of the lumen and to the wall.

    In health the lumen is 0.62 (SD 0.13) of the artery's width, and walls of segmental bronchi are 1.1 mm thick
    (J Comput Assist Tomogr 1997, PubMed 9071307).
    """
    part = tree.take(tree.level < levels)
    centre, tangent, length, which = slices(part, step)
    artery, level = part.radius[which], part.level[which]
    lumen = artery * np.float32(LUMEN)
    wall = np.float32(0.4) + np.float32(0.25) * lumen
    if widen is not None:
        lumen = lumen + widen(centre, level)
    if thicken is not None:
        wall = wall + thicken(centre, level)
    # On the side of the artery that looks up and forward, as far as they touch.
    up = f32([[0.35, 0.75, 0.56]])
    off = up - tangent * (tangent * up).sum(1, keepdims=True)
    off /= np.maximum(np.sqrt((off * off).sum(1, keepdims=True)), np.float32(0.2))
    centre = centre + off * (artery + lumen + wall)[:, None]
    return Bronchi(centre, tangent, length, lumen.astype(np.float32), wall.astype(np.float32), level, artery)
