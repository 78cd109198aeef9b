"""The file that ``fedmaestro new`` writes, with the kinds of own code that most papers need, and its experiment."""

from pathlib import Path

from fedmaestro.errors import UserError
from fedmaestro.runs.folder import write_atomically

_CODE = '''"""My paper: data with users, a model, a local objective, an aggregation and a metric of its own.

    fedmaestro run {experiment}                                  # in the folder of this file
    fedmaestro compare {experiment} --strategies nested,mine --seeds 3
    fedmaestro list models --use {file}

Take out what you do not need. Each decorator adds one row to the table that `fedmaestro list KIND` shows; server and
hosts load this file before any name is looked up.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fedmaestro import extend
from fedmaestro.strategies.coverage_mean import finish as coverage_mean


@extend.dataset("waves")
def waves():
    """Noisy sines of four frequencies, recorded by twelve users."""
    # x: (N, ...) floats, tokens (integers) or uint8 pixels; y: classes of any kind, numbers, or left out to predict
    # the next token; groups: who each example belongs to. Also: train=..., test=... with tables or datasets.
    rng = np.random.default_rng(0)
    y, users = rng.integers(4, size=1200), rng.integers(12, size=1200)
    time = np.arange(32)[:, None]
    x = np.sin(0.3 * time * (y[:, None, None] + 1) + rng.normal(size=(1200, 1, 6)))
    x += 0.3 * rng.normal(size=x.shape)
    train, test = slice(900), slice(900, None)
    return dict(
        x=x[train], y=y[train], groups=users[train],
        x_test=x[test], y_test=y[test], groups_test=users[test],
    )


@extend.model("gru")
class Gru(nn.Module):
    """GRU over time, then two linear layers."""

    # Linear, convolution and attention layers become rank-ordered factors; others stay as they are.
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.rnn = nn.GRU(input_shape[1], 32, batch_first=True)
        self.hidden = nn.Linear(32, 64)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.head(self.hidden(self.rnn(x)[0][:, -1]).relu())


@extend.objective("smoothed")
def smoothed(prefixes, x, y, rng):
    """Cross-entropy with label smoothing."""
    # prefixes(x) is the device's own model; prefixes(x, level) the nested one of the level-th smaller tier.
    return F.cross_entropy(prefixes(x), y, label_smoothing=0.1)


@extend.aggregation("damped")
def damped(partial, old):
    """Half way from the old model to the mean over the devices that hold each entry."""
    new = coverage_mean(partial, old)
    return {{name: torch.lerp(old[name], new[name], 0.5) for name in old}}


@extend.metric("worst-class")
class WorstClass:
    """Share of right answers in the worst class."""

    percent = True

    def update(self, outputs, targets):  # sums that add up over parts of the test set
        right, classes = targets[outputs.argmax(dim=-1) == targets], outputs.shape[-1]
        return {{"right": right.bincount(minlength=classes), "all": targets.bincount(minlength=classes)}}

    def compute(self, sums):
        return float((sums["right"] / sums["all"].clamp(min=1)).min())


# A method is a row: values of settings (`fedmaestro list settings`) under a name of its own.
extend.strategy(
    "mine", {{"train.objective": "smoothed", "train.aggregation": "damped"}}, summary="what my paper proposes"
)
'''

_EXPERIMENT = """# The experiment of {file}. `fedmaestro list settings` says what else can be set.
use = "{file}"

[data]
name = "waves"
partition = "natural"  # each user is a device
metrics = "accuracy worst-class"

[model]
name = "gru"

[train]
strategy = "mine"
rounds = 30
devices-per-round = 6
lr = 0.3
"""


def write_starter(file: Path) -> Path:
    """Write ``file`` and an experiment beside it; return the experiment's path.

    Raises:
        UserError: a name that Python cannot import, or a file that is there already.
    """
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise UserError(f"{file}: name a Python file whose name can be imported, my_paper.py say")
    experiment = file.with_suffix(".toml")
    for path in (file, experiment):
        if path.exists():
            raise UserError(f"{path} is there already: choose another name")
    names = {"file": file.name, "experiment": experiment.name}
    try:
        write_atomically(file, _CODE.format(**names))
        write_atomically(experiment, _EXPERIMENT.format(**names))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
    return experiment
