"""Draws 10,186 scenes, as in the paper: seven kinds of vehicle with known view and occlusion.

The sprites of vehicles, trees and ground are from Debian's package simutrans-pak64 (`apt install
simutrans-pak64`; Artistic-1.0: do not commit the sprites or images made of them). A sprite stands
on a ground texture. An occluded vehicle has a tree in front that covers 20 to 60 % of it.

The paper's three experiments: A repairs occluded scenes; B repairs front and back views; C is B
with drift: front and back views are rare in train and val, common in repair and test.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

PAK = Path("/usr/share/games/simutrans/pak")
SIZE = 32
CLASSES = [
    "aircraft",
    "ship",
    "road_motor",
    "road_trailer",
    "steam_loco",
    "diesel_electric_loco",
    "rail_wagon",
]
VIEWS = ["front", "back", "side"]
SPLITS = {"train": 0.40, "val": 0.10, "repair": 0.20, "test": 0.30}
HEADING_VIEW = [0, 1, 2, 0, 1, 0, 2, 1]  # s w sw se n e ne nw
SPECIAL_COLOUR = 0x8000  # larger values are company colours or lights


class Node(NamedTuple):
    kind: str
    data: bytes
    children: list


class Sprite(NamedTuple):
    pixels: np.ndarray  # uint16 [h, w]
    mask: np.ndarray  # bool [h, w]


class Design(NamedTuple):
    label: int
    headings: list  # of Optional[Sprite], 4 or 8


def read_pak(path: Path) -> Node:
    raw = path.read_bytes()

    def node(at: int):
        kind = raw[at : at + 4].rstrip(b"\0").decode("latin1")
        n_children, size = struct.unpack_from("<HH", raw, at + 4)
        at += 8
        if size == 0xFFFF:
            (size,) = struct.unpack_from("<I", raw, at)
            at += 4
        data, at, children = raw[at : at + size], at + size, []
        for _ in range(n_children):
            child, at = node(at)
            children.append(child)
        return Node(kind, data, children), at

    return node(raw.index(b"\x1a") + 5)[0]


def walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from walk(child)


def sprite(data: bytes) -> Sprite | None:
    """Decodes a run-length coded IMG node."""
    version = data[6]
    if version == 0:
        w, h, offset = data[1], data[3], 12
    elif version <= 2:
        w, h, offset = data[4], data[5], 10
    else:
        (w,), (h,), offset = (
            struct.unpack_from("<h", data, 4),
            struct.unpack_from("<h", data, 7),
            10,
        )
    if w <= 0 or h <= 0:
        return None
    words = np.frombuffer(data, "<u2", offset=offset, count=(len(data) - offset) // 2)
    pixels, mask, at = np.zeros((h, w), np.uint16), np.zeros((h, w), bool), 0
    for row in range(h):
        column, skip = 0, int(words[at])
        at += 1
        while True:
            column += skip & 0x7FFF
            run = int(words[at]) & 0x7FFF
            at += 1
            pixels[row, column : column + run] = words[at : at + run]
            mask[row, column : column + run] = True
            at, column = at + run, column + run
            skip = int(words[at])
            at += 1
            if skip == 0:
                break
    return Sprite(pixels, mask)


def rgb(s: Sprite, company=((0.3, 0.4, 1.0), (1.0, 0.6, 0.2))) -> np.ndarray:
    p = s.pixels.astype(int)
    out = np.stack([(p >> shift & 31) * 255 // 31 for shift in (10, 5, 0)], -1).astype(np.uint8)
    shade = p - SPECIAL_COLOUR
    for first, colour in zip((0, 8), company, strict=True):
        m = s.mask & (shade >= first) & (shade < first + 8)
        if m.any():
            out[m] = np.clip(np.outer((shade[m] - first) * 22 + 70, colour), 0, 255).astype(
                np.uint8
            )
    out[s.mask & (shade >= 16)] = (225, 220, 140)
    return out


def vehicle_label(way: int, engine: int, power: int) -> int | None:
    road, rail, water, air, steam, animal = 1, 2, 3, 16, 0, 3
    if way == air:
        return 0
    if way == water:
        return 1
    if way == road:
        return 2 if power and engine != animal else 3
    if way == rail:
        return 6 if not power else (4 if engine == steam else 5)
    return None  # without trams and monorails


def load_designs(pak: Path) -> list:
    designs = []
    for path in sorted(pak.glob("vehicle.*.pak")):
        for n in walk(read_pak(path)):
            if n.kind != "VHCL":
                continue
            label = vehicle_label(n.data[34], n.data[36], struct.unpack_from("<I", n.data, 18)[0])
            lists = [c for c in n.children if c.kind in ("IMG1", "IMG2")]
            if label is not None and lists:
                headings = [sprite(c.data) for c in walk(lists[0]) if c.kind == "IMG"][:8]
                designs.append(Design(label, headings))
    return designs


def load_sprites(pak: Path, pattern: str, smallest: int = 1, largest: int = 999) -> list:
    found = []
    for path in sorted(pak.glob(pattern)):
        for n in walk(read_pak(path)):
            s = sprite(n.data) if n.kind == "IMG" else None
            if (
                s is not None
                and smallest <= max(s.mask.shape) <= largest
                and not (s.pixels[s.mask] >= SPECIAL_COLOUR).any()
            ):
                found.append(s)
    return found


def paste(canvas: np.ndarray, image: np.ndarray, mask: np.ndarray, y: int, x: int) -> np.ndarray:
    """Draws an image on the canvas where `mask` is True.

    Returns the covered pixels, `SIZE x SIZE` bool.
    """
    y0, x0, y1, x1 = (
        max(0, y),
        max(0, x),
        min(SIZE, y + mask.shape[0]),
        min(SIZE, x + mask.shape[1]),
    )
    covered = np.zeros((SIZE, SIZE), bool)
    if y1 > y0 and x1 > x0:
        covered[y0:y1, x0:x1] = mask[y0 - y : y1 - y, x0 - x : x1 - x]
        canvas[covered] = image[y0 - y : y1 - y, x0 - x : x1 - x][covered[y0:y1, x0:x1]]
    return covered


def compose(rng, design: Design, s: Sprite, grounds: list, trees: list, occlude: bool):
    on_water = design.label == 1 and rng.random() < 0.7
    ground = grounds[0 if on_water else rng.integers(1, 7)]
    y, x = rng.integers(0, min(ground.shape[:2]) - SIZE, 2)
    canvas = ground[y : y + SIZE, x : x + SIZE].copy()
    picture = np.dstack([rgb(s, company=rng.uniform(0.15, 1.05, (2, 3))), s.mask * np.uint8(255)])
    largest = max(s.mask.shape)
    scale = (
        min(1.0, 30 / largest) * rng.uniform(0.85, 1.0) if largest > 26 else rng.uniform(0.9, 1.15)
    )
    picture = Image.fromarray(picture, "RGBA")
    picture = picture.resize([max(3, round(v * scale)) for v in picture.size], Image.BILINEAR)
    picture = np.asarray(picture)
    h, w = picture.shape[:2]
    at = [
        int(np.clip((SIZE - v) // 2 + rng.integers(-4, 5), min(0, SIZE - v), max(0, SIZE - v)))
        for v in (h, w)
    ]
    vehicle = paste(canvas, picture[..., :3], picture[..., 3] > 127, *at)
    covered = 0.0
    if occlude and vehicle.any():
        for _ in range(20):
            tree = trees[rng.integers(len(trees))]
            spots = np.argwhere(vehicle)
            cy, cx = spots[rng.integers(len(spots))] - np.array(tree.mask.shape) // 2
            trial = canvas.copy()
            hidden = paste(trial, rgb(tree), tree.mask, cy, cx)
            share = (hidden & vehicle).sum() / vehicle.sum()
            if 0.2 <= share <= 0.6:
                canvas, covered = trial, share
                break
    noisy = canvas + rng.normal(0, 4, canvas.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), covered


def make_split(rng, n: int, pak, p_occluded: float, p_front_back: float | None) -> dict:
    designs, grounds, trees = pak
    by_label = [[d for d in designs if d.label == k] for k in range(len(CLASSES))]
    rows = []
    while len(rows) < n:
        pool = by_label[rng.integers(len(CLASSES))]
        design = pool[rng.integers(len(pool))]
        heading = int(rng.integers(len(design.headings)))
        view = (
            HEADING_VIEW[heading]
            if len(design.headings) == 8
            else (2 if HEADING_VIEW[heading] == 2 else 0)
        )
        if design.headings[heading] is None:
            continue
        if p_front_back is not None and (view == 2) != (rng.random() >= p_front_back):
            continue
        image, covered = compose(
            rng, design, design.headings[heading], grounds, trees, rng.random() < p_occluded
        )
        rows.append((image, design.label, view, covered > 0))
    x, y, view, occluded = zip(*rows, strict=True)
    return {
        "x": np.stack(x),
        "y": np.array(y, np.int64),
        "view": np.array(view, np.int8),
        "occluded": np.array(occluded),
    }


def rates(experiment: str, split: str) -> tuple[float, float | None]:
    """Returns the shares of occluded scenes and of front and back views.

    None stands for views that are uniform over headings.
    """
    later = split in ("repair", "test")
    p_occluded = {"A": 0.30 if later else 0.15, "B": 0.0, "C": 0.0}[experiment]
    p_front_back = {"A": None, "B": 0.4, "C": 0.5 if later else 0.05}[experiment]
    return p_occluded, p_front_back


def make(pak_dir: Path, experiment: str, seed: int = 0, total: int = 10186) -> dict:
    """Draws the scenes of an experiment.

    Returns:
        For each split `s`: `s_x` uint8 `N x 32 x 32 x 3`, `s_y` the kind of vehicle, `s_view` (0
        front, 1 back, 2 side), and `s_occluded`.
    """
    pak = (
        load_designs(pak_dir),
        [rgb(s) for s in load_sprites(pak_dir, "ground.ClimateTexture.pak")],
        load_sprites(pak_dir, "tree.*.pak", 10, 40),
    )
    if not pak[0] or not pak[1] or not pak[2]:
        raise SystemExit(
            f"{pak_dir} has no sprites of vehicles, ground and trees.\n"
            "HINT: apt install simutrans-pak64"
        )
    rng, out = np.random.default_rng(seed), {}
    for split, share in SPLITS.items():
        for key, value in make_split(
            rng, round(total * share), pak, *rates(experiment, split)
        ).items():
            out[f"{split}_{key}"] = value
    return out
