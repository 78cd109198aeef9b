"""Next-character prediction: Python source text that every machine has, a device for each module.

The text is the standard library of the Python that runs this, 60 of its modules, cut into pieces of 65 characters; a
device is a module: its author's habits, words and subject are its own. A fifth of each module's pieces is its own test
set and, together, the global one. Figures depend on the version of Python, which the results name.
"""

import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedmaestro import extend

_LENGTH, _PIECES = 65, 80
_MODULES = """
argparse ast base64 bdb bisect calendar cgi cmd codecs code collections/__init__ configparser contextlib copy csv
dataclasses datetime decimal difflib dis doctest enum fileinput fractions ftplib functools gettext glob gzip heapq
imaplib inspect ipaddress locale mailbox mimetypes netrc nntplib numbers optparse os pathlib pdb pickle platform
plistlib poplib pprint profile queue quopri random sched shelve shlex shutil smtplib socket statistics string
"""


@extend.dataset("python-text", task="next-token")
def python_text():
    """Characters of the standard library of Python, users are modules."""
    folder = Path(sysconfig.get_path("stdlib"))
    known = "\n" + "".join(chr(i) for i in range(32, 127))
    token = {character: i + 1 for i, character in enumerate(known)}
    x: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    users: dict[str, list[int]] = {"train": [], "test": []}
    for user, module in enumerate(_MODULES.split()):
        path = folder / f"{module}.py"
        if not path.is_file():  # removed in a later Python
            continue
        text = np.array([token[c] for c in path.read_text(encoding="utf-8") if c in token])
        pieces = text[: len(text) // _LENGTH * _LENGTH].reshape(-1, _LENGTH)
        pieces = pieces[np.random.default_rng(user).permutation(len(pieces))[:_PIECES]]
        cut = len(pieces) // 5
        for split, part in (("test", pieces[:cut]), ("train", pieces[cut:])):
            x[split].append(part)
            users[split] += [user] * len(part)
    return {
        "x": np.concatenate(x["train"]),
        "groups": users["train"],
        "x_test": np.concatenate(x["test"]),
        "groups_test": users["test"],
        "classes": len(known) + 1,
    }


@extend.model("causal-transformer")
class CausalTransformer(nn.Module):
    """Two pre-norm layers of 64 features and four heads that see earlier characters only."""

    def __init__(self, input_shape: tuple[int, ...], vocabulary: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, 64), nn.Embedding(input_shape[0], 64)
        layer = nn.TransformerEncoderLayer(64, 4, 192, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map characters ``(B, T)`` to logits ``(B, T, vocabulary)``."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.token(tokens) + self.place(torch.arange(length, device=tokens.device))
        out: Tensor = self.head(self.norm(self.layers(x, mask=mask, is_causal=True)))
        return out
