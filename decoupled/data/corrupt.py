"""Harder training data, made once: images turned by a fixed angle each, and labels that are wrong.

    rotate(images, 90, seed)           every image by its own angle, uniform in [-90, 90] degrees
    relabel(labels, 0.2, 10, seed)     every fifth label becomes another class, any one with the same probability

A sample is the same in every epoch. Held-out data stay as they are.
"""

from __future__ import annotations

import numpy as np

from decoupled.errors import UserError

_ANGLES, _LABELS = 2, 3  # streams of random numbers, apart from those of splits


def rotate(images: np.ndarray, degrees: float, seed: int) -> np.ndarray:
    """Turn every image by an angle of its own, bilinear, the corners filled with 0.

    Args:
        images: (N, C, H, W), integers keep their type. degrees: largest angle, either way. seed: not negative.

    Raises:
        UserError: a negative angle, or scipy is missing.
    """
    if degrees < 0:
        raise UserError(f"rotate must be an angle of at least 0 degrees, got {degrees}")
    if not degrees:
        return images
    try:
        from scipy.ndimage import rotate as turn
    except ImportError as error:
        raise UserError(f"rotate needs scipy ({error}); pip install 'decoupled-training[bench]'") from error
    angles = np.random.default_rng([seed, _ANGLES]).uniform(-degrees, degrees, len(images))
    pairs = zip(images, angles, strict=True)
    return np.stack([turn(image, angle, axes=(2, 1), reshape=False, order=1) for image, angle in pairs])


def relabel(labels: np.ndarray, share: float, classes: int, seed: int) -> np.ndarray:
    """Replace a share of the labels, rounded to whole samples, by another class.

    Args:
        labels: (N,), integers. share: 0 to 1. classes: how many there are. seed: not negative.

    Raises:
        UserError: a share below 0 or above 1.
    """
    if not 0 <= share <= 1:
        raise UserError(f"label_noise must be a share from 0 to 1, got {share}")
    draw = np.random.default_rng([seed, _LABELS])
    wrong = draw.permutation(len(labels))[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong].astype(np.int64) + draw.integers(1, classes, len(wrong))) % classes
    return noisy
