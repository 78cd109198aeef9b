"""FedMaestro: simulate federations of unequal devices that share one low-rank ordered (LoD) network.

From Python::

    import fedmaestro

    run = fedmaestro.run("experiments/mnist.toml", overrides={"train.rounds": 5})
    model = run.model(tier="low")

The core (``lod``, ``models``, ``tasks``, ``data``, ``fleet``, ``rounds``) knows neither Flower nor Ray;
``fedmaestro.flower`` is the shell that runs it there. ``strategies/`` and ``clients/`` are top-level folders of the
repository that are imported as ``fedmaestro.strategies`` and ``fedmaestro.clients``. docs/architecture.md is the map.
"""

from __future__ import annotations

import os
import tomllib
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmaestro.deploy.extract import extract
    from fedmaestro.flower.compare import compare
    from fedmaestro.flower.run import run
    from fedmaestro.flower.tune import tune
    from fedmaestro.runs.model import load_model
    from fedmaestro.training.run import train

# flwr and flwr-datasets read this once, when they are first imported; their events would go to their makers.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

_ROOT = Path(__file__).parent.parent
_PYPROJECT = _ROOT / "pyproject.toml"

# In a checkout and in a Flower App Bundle, strategies/ and clients/ lie beside this package; in a wheel, inside.
if _PYPROJECT.is_file() and (_ROOT / "strategies" / "__init__.py").is_file():
    __path__.append(str(_ROOT))
    __version__: str = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]["version"]
else:
    __version__ = metadata.version("fedmaestro")

_FUNCTIONS = {
    "compare": "flower.compare",
    "extract": "deploy.extract",
    "load_model": "runs.model",
    "run": "flower.run",
    "train": "training.run",
    "tune": "flower.tune",
}

__all__ = ["__version__", "compare", "extract", "load_model", "run", "train", "tune"]


def __getattr__(name: str) -> Any:
    """Import a function when it is asked for: PyTorch, Flower and Ray take seconds."""
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
