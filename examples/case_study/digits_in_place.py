"""Scikit-learn's digits as a substitute for the vehicles, where their sprites cannot be installed.

The 8 x 8 pixels are drawn at 16 x 16. An occluded digit has a square in front of it. A digit that
is rotated by 25 to 50 degrees to the left counts as a front view, to the right as a back view; all
others are side views. The shares are those of the vehicles, in each experiment and split.

The paper's findings are about vehicles, so results on digits neither confirm nor contradict them.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import rotate, zoom
from sklearn.datasets import load_digits
from vehicles import SPLITS, rates

SIZE = 16
FRONT, BACK, SIDE = 0, 1, 2


def draw(experiment: str, seed: int = 0, total: int = 1_797) -> dict[str, np.ndarray]:
    """Draws the digits of an experiment. Splits do not overlap.

    Returns:
        For each split `s`: `s_x` uint8 `N x 16 x 16 x 3`, `s_y` the digit, `s_view` (0 front, 1
        back, 2 side), and `s_occluded`.
    """
    rng, digits = np.random.default_rng(seed), load_digits()
    order, out, at = rng.permutation(len(digits.images))[:total], {}, 0
    for split, share in SPLITS.items():
        rows = order[at : at + int(total * share)]
        at += len(rows)
        p_occluded, p_turned = rates(experiment, split)
        occluded = rng.random(len(rows)) < p_occluded
        turned = rng.random(len(rows)) < (p_turned or 0)
        view = np.where(turned, rng.integers(0, 2, len(rows)), SIDE)
        scenes = [
            _scene(rng, digits.images[row], *kind)
            for row, *kind in zip(rows, view, occluded, strict=True)
        ]
        columns = {
            "x": np.stack(scenes),
            "y": digits.target[rows],
            "view": view.astype(np.int8),
            "occluded": occluded,
        }
        out |= {f"{split}_{name}": column for name, column in columns.items()}
    return out


def _scene(rng: np.random.Generator, digit: np.ndarray, view: int, occluded: bool) -> np.ndarray:
    image = zoom(digit, SIZE / len(digit), order=1)
    if view != SIDE:
        image = rotate(
            image, rng.uniform(25, 50) * (1 if view == FRONT else -1), reshape=False, order=1
        )
    image = np.clip(image / 16 * 255 + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
    if occluded:
        side = rng.integers(5, 8)
        y, x = rng.integers(2, SIZE - side - 1, 2)
        image[y : y + side, x : x + side] = rng.integers(60, 200)
    return np.repeat(image[:, :, None], 3, axis=2)
