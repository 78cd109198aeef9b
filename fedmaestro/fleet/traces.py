"""Traces of models (``fleet.cost``), measured once per machine: measuring loads PyTorch's compiler, some 2 s a process.

Kept in the cache folder for the models of this package. An own model may be anything that its code says, so it is
measured in every process.
"""

import hashlib
import json
from dataclasses import asdict, fields
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import torch

from fedmaestro.data import cache
from fedmaestro.errors import UserError
from fedmaestro.fleet.cost import LayerTrace, Trace, trace
from fedmaestro.models.architecture import Architecture, Size

_FILE = "trace.json"


@lru_cache(maxsize=256)
def trace_of(architecture: Architecture, width: Fraction | None = None, depth: int | None = None) -> Trace:
    """Return the trace of a LoD model, from which the closed form covers all ranks, or of a dense one of a size."""

    def measured() -> Trace:
        model = architecture.measurable(None if width is None and depth is None else Size(width=width, depth=depth))
        return trace(model, architecture.inputs)

    if architecture.own:
        return measured()
    about = [str(getattr(architecture, x.name)) for x in fields(architecture) if x.init] + [str(width), str(depth)]
    try:
        entry = cache.cache_root() / "traces" / cache.key(about, torch.__version__, _code())
        return cache.fetch(entry, lambda folder: _write(folder, measured()), _read)
    except UserError:  # a cache that cannot be written: opening the data says so, where it matters
        return measured()


def _write(folder: Path, traced: Trace) -> None:
    (folder / _FILE).write_text(json.dumps(asdict(traced)), encoding="utf-8")


def _read(folder: Path) -> Trace:
    known = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    return Trace(**{**known, "layers": tuple(LayerTrace(**layer) for layer in known["layers"])})


@lru_cache(maxsize=1)
def _code() -> str:
    """Return a hash of all code that a trace depends on."""
    package = Path(__file__).parent.parent
    files = [*sorted((package / "models").glob("*.py")), *sorted((package / "lod").glob("*.py"))]
    return hashlib.sha256(b"".join(x.read_bytes() for x in [*files, package / "fleet" / "cost.py"])).hexdigest()
