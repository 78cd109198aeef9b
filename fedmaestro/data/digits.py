"""The handwritten digits that scikit-learn embeds: a real dataset that needs no files and no network."""

import numpy as np

from fedmaestro.data.decode import Arrays

_SPLIT_SEED = 0


def digits() -> tuple[Arrays, Arrays]:
    """Return (images (N, 1, 8, 8), labels (N,)) of a fixed stratified split: 1,437 to train, 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, np.newaxis]  # 0..16 to 0..255
    labels = bunch.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=_SPLIT_SEED)
    return (images[train], labels[train]), (images[test], labels[test])
