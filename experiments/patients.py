"""Regression with users: scikit-learn's diabetes patients, a device for each group of one sex and similar age.

442 patients with ten measurements each; the target is how far the disease has gone a year later (25 to 346). Patients
are grouped by sex and, within each sex, by age into twelve groups of equal size: 24 devices whose patients differ in
what predicts the target. A fifth of each device's patients is its own test set and, together, the global one.
"""

import numpy as np
from sklearn.datasets import load_diabetes

from fedmaestro import extend

_GROUPS = 12


@extend.dataset("patients", task="regression")
def patients():
    """Diabetes progression of 442 patients (scikit-learn), users by sex and age."""
    bunch = load_diabetes(scaled=False)
    x, y = bunch.data.astype(np.float32), bunch.target
    age, sex = (x[:, bunch.feature_names.index(name)] for name in ("age", "sex"))
    users = np.empty(len(y), int)
    for i, value in enumerate(np.unique(sex)):
        rows = np.nonzero(sex == value)[0]
        by_age = rows[np.lexsort((rows, age[rows]))]
        for j, part in enumerate(np.array_split(by_age, _GROUPS)):
            users[part] = _GROUPS * i + j
    held = np.zeros(len(y), bool)
    order = np.random.default_rng(0).permutation(len(y))
    for user in np.unique(users):
        mine = order[users[order] == user]
        held[mine[: round(0.2 * len(mine))]] = True
    # In standard deviations of the training targets, so that errors of 1 are those of the mean.
    y = (y - y[~held].mean()) / y[~held].std()
    mean, std = x[~held].mean(axis=0), x[~held].std(axis=0)
    x = (x - mean) / std
    return {
        "x": x[~held],
        "y": y[~held],
        "groups": users[~held],
        "x_test": x[held],
        "y_test": y[held],
        "groups_test": users[held],
    }
