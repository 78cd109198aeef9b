"""FedMaestro: simulate federations of unequal devices that share one low-rank ordered (LoD) network.

The functional core (``lod``, ``models``, ``cost``, ``fleet``, ``clock``, ``submodel``) knows neither Flower nor
Ray; ``fedmaestro.flower`` is the shell that runs it there. ``strategies/`` and ``clients/`` are top-level folders of
the repository that are imported as ``fedmaestro.strategies`` and ``fedmaestro.clients``.
"""

from __future__ import annotations

import os
import tomllib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmaestro.config.experiment import ExperimentConfig
    from fedmaestro.flower.run import Run

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


def run(experiment: str | Path | ExperimentConfig | None = None, **options: Any) -> Run:
    """Run an experiment; ``fedmaestro.flower.run.run`` lists the options (``overrides``, ``data_dir``, ``out``, …)."""
    from fedmaestro.flower.run import run as run_experiment

    return run_experiment(experiment, **options)
