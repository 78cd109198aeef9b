"""Model artefacts: ``model.safetensors`` holds the tensors, ``model.json`` (the card) what makes a module of them."""

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, field_validator
from pydantic_core import PydanticCustomError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor, nn

from fedmaestro import lod
from fedmaestro.errors import UserError, check_name
from fedmaestro.models import MODELS
from fedmaestro.models.architecture import FULL, Architecture, Size
from fedmaestro.models.masks import masked
from fedmaestro.models.shape import Input, Inputs
from fedmaestro.models.static_norm import set_statistics
from fedmaestro.places import read_file
from fedmaestro.runs.checkpoint import file_key
from fedmaestro.runs.code import activate, read_code
from fedmaestro.runs.folder import write_atomically, write_record
from fedmaestro.runs.reader import read_json
from fedmaestro.runs.records import Record
from fedmaestro.runs.trust import honoured
from fedmaestro.submodel import State, cut, load, shapes_of


def _block_count(depth: Any) -> int:
    if type(depth) is not int or depth < 0:
        raise ValueError(f"depth {depth!r} is no number of blocks")
    return depth


def _size(form: Any) -> Size:
    if isinstance(form, Size):
        return form
    try:
        ranks = {str(layer): int(rank) for layer, rank in form["ranks"].items()} if "ranks" in form else None
        if form.keys() & {"width", "depth", "share"}:
            width, share = (Fraction(form[key]) if key in form else None for key in ("width", "share"))
            depth = _block_count(form["depth"]) if "depth" in form else None
            return Size(width=width, share=share, depth=depth, ranks=ranks)
        if ranks is None:
            raise KeyError("ranks")
        return Size(ranks=ranks)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise PydanticCustomError("size", f"no usable size: {type(error).__name__} {error}") from None


def _size_form(size: Size) -> dict[str, Any]:
    parts: dict[str, Any] = {key: str(x) for key, x in (("width", size.width), ("share", size.share)) if x is not None}
    parts |= {} if size.depth is None else {"depth": size.depth}
    return parts if parts and size.ranks is None else parts | {"ranks": dict(size.ranks or {})}


CardSize = Annotated[Size, PlainValidator(_size), PlainSerializer(_size_form)]
"""In JSON ``{"ranks": {layer: rank}}``, ``{"width": "1/4"}``, ``{"depth": 2}``, both of two, ``{"share": "1/4"}``."""


def _width(form: Any) -> Fraction:
    try:
        width = Fraction(form)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise PydanticCustomError("width", f"no usable width: {type(error).__name__} {error}") from None
    if not 0 < width <= 1:
        raise PydanticCustomError("width", f"no usable width: {width} is not in (0, 1]")
    return width


CardWidth = Annotated[Fraction, PlainValidator(_width), PlainSerializer(str)]
"""In JSON ``"1/4"``."""


def _inputs(form: Any) -> Inputs:
    try:
        return tuple(x if isinstance(x, Input) else Input(tuple(map(int, x["shape"])), x["dtype"]) for x in form)
    except (KeyError, TypeError, ValueError) as error:
        raise PydanticCustomError("inputs", f"no usable inputs: {type(error).__name__} {error}") from None


def _inputs_form(inputs: Inputs) -> list[dict[str, Any]]:
    return [{"shape": list(x.shape), "dtype": x.dtype} for x in inputs]


CardInputs = Annotated[Inputs, PlainValidator(_inputs), PlainSerializer(_inputs_form)]
"""In JSON ``[{"shape": [1, 28, 28], "dtype": "float32"}, …]``."""


LARGEST_INPUT = 2**28
"""Numbers of an example; a card that asks for more is damaged."""


class ModelCard(Record):
    """``model.json``. Further keys are facts about the data and, of an extracted model, what it costs."""

    format: int = 1
    model: str
    form: Literal["lod", "dense"]
    keep_dense: str
    norm: Literal["group", "static"] = "group"
    width: CardWidth = FULL
    """Of the whole network (``model.width``)."""
    scales: Literal["width", "depth", "both", "blocks", "entries"] = "width"
    exits: Literal["none", "ensemble", "last"] = "none"
    input_shape: list[Annotated[int, Field(ge=0, le=2**20)]] = Field(max_length=8)
    num_classes: int = Field(ge=1, le=10**7)
    inputs: CardInputs = ()
    """Empty: what ``inputs_of`` makes of ``input_shape``."""
    size: CardSize
    """Of the whole model."""
    tiers: dict[str, CardSize] = Field(default_factory=dict)
    """What serves each tier of a federation."""
    separate: dict[str, str] = Field(default_factory=dict)
    """Where sizes are models of their own: under whose name each tier's lies. There is no whole model then."""
    per_tier: list[str] = Field(default_factory=list)
    """Names of the tensors that lie under the name of each tier too, which has its own of them."""
    recomposed: bool = False
    """Whether layers are dense wherever that has no more weights."""
    sha256: str | None = None

    @field_validator("input_shape")
    @classmethod
    def _fits(cls, shape: list[int]) -> list[int]:
        if math.prod(shape) > LARGEST_INPUT:
            raise ValueError(f"an example would have {math.prod(shape):,} numbers, more than {LARGEST_INPUT:,}")
        return shape

    def architecture(self, folder: Path) -> Architecture:
        """Return the architecture; UserError if neither this version nor the folder's own code knows the model."""
        if code := read_code(folder):
            activate(code)
        check_name("model", self.model, MODELS, f" in {folder}/model.json")
        return Architecture(
            name=self.model,
            input_shape=tuple(self.input_shape),
            num_classes=self.num_classes,
            inputs=self.inputs,
            form=self.form,
            keep_dense=self.keep_dense,
            norm=self.norm,
            width=self.width,
            scales=self.scales,
            exits=self.exits,
        )

    def check_tier(self, tier: str | None, folder: Path) -> None:
        """Raise UserError unless ``tier`` is None or one that the card knows."""
        if tier is None:
            return
        if not self.tiers:
            raise UserError(f"the model in {folder} is none of a federation: it has no tiers")
        check_name("tier", tier, self.tiers, f" in {folder}")


_STATISTICS = "@statistics"
"""First part of the names of what static norms evaluate by; no tier's quoted name has such a sign."""


def write_model(
    folder: Path,
    models: Mapping[str | None, State],
    card: ModelCard,
    statistics: Mapping[str | None, State] | None = None,
) -> str:
    """Write the tensors and the card; return the SHA-256 of the tensors' file.

    Args:
        folder: of the run.
        models: the one model under None, or those of ``card.separate`` under their names; the tiers' own tensors
            (``card.per_tier``) under theirs.
        card: what makes modules of them.
        statistics: of the norms of a tier's model, or under None of the whole one's (``static_norm.statistics``).
    """
    tensors: dict[str, Tensor] = {}
    for tier, fixed in (statistics or {}).items():
        prefix = _statistics_of(tier)
        tensors |= {prefix + name: tensor.contiguous() for name, tensor in fixed.items()}
    for owner, state in models.items():
        prefix = "" if owner is None else f"{file_key(owner)}/"
        tensors |= {prefix + name: tensor.contiguous() for name, tensor in state.items()}
    content = save(tensors)
    sha256 = hashlib.sha256(content).hexdigest()
    write_atomically(folder / "model.safetensors", content)
    write_record(folder / "model.json", card.model_copy(update={"sha256": sha256}))
    return sha256


def _statistics_of(tier: str | None) -> str:
    return f"{_STATISTICS}/{file_key(tier or '')}/"


def read_card(folder: Path) -> ModelCard:
    """Read ``model.json``; UserError if it is missing or no card."""
    return read_json(folder / "model.json", ModelCard)


def read_model(folder: Path) -> tuple[State, ModelCard]:
    """Read what ``write_model`` wrote, all tensors in one state, without statistics.

    Raises:
        UserError: a missing or corrupt artefact.
    """
    state, card = _read_tensors(folder)
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{_STATISTICS}/")}, card


def _read_tensors(folder: Path) -> tuple[State, ModelCard]:
    card = read_card(folder)
    try:
        content = read_file(folder / "model.safetensors", None)
        state = load_tensors(content)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"no readable model in {folder}: {error}") from None
    if card.sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise UserError(f"{folder / 'model.safetensors'} is corrupt: its SHA-256 is not that of model.json")
    return state, card


@honoured
def load_model(folder: str | Path, tier: str | None = None, *, trust: bool = False) -> nn.Module:  # noqa: ARG001
    """Return the model that a run, a training or an extraction left in ``folder``, in evaluation mode.

    Args:
        folder: holds ``model.safetensors`` and ``model.json``.
        tier: cut the model of a federation to what serves this tier; None: the whole one.
        trust: run the code that the folder holds, also where somebody else has written it.

    Raises:
        UserError: no readable model, an unknown tier, or tensors that do not belong to the card.
    """
    folder = Path(folder)
    state, card = _read_tensors(folder)
    prefix = _statistics_of(tier)
    fixed = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{_STATISTICS}/")}
    architecture = card.architecture(folder)
    card.check_tier(tier, folder)
    if card.separate:
        # Each size is a model of its own (``rounds.storage``): there is no whole one.
        if tier is None:
            raise UserError(f"the tiers of {folder} are separate models: name one of {', '.join(card.separate)}")
        owner = f"{file_key(card.separate.get(tier, tier))}/"
        state = {name.removeprefix(owner): tensor for name, tensor in state.items() if name.startswith(owner)}
    if card.per_tier:
        copies = {f"{file_key(owner)}/{name}": (owner, name) for owner in card.tiers for name in card.per_tier}
        shared = {name: tensor for name, tensor in state.items() if name not in copies}
        state = shared | {name: state[key] for key, (owner, name) in copies.items() if owner == tier and key in state}
    size = card.size if tier is None else card.tiers[tier]
    try:
        model = architecture.build(size)
    except UserError:
        raise
    except Exception as error:  # a card may ask for whatever a model's function cannot make
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"model.json in {folder} is no model card: it gives no usable size: {reason}") from None
    if card.recomposed:
        model = lod.recompose(model)
    if size.share is not None:
        state = masked(state, size.share)
    model = filled(architecture.on_cpu(model), state, folder, cut_to_size=tier is not None)
    set_statistics(model, fixed)
    return model


def filled(model: nn.Module, state: State, folder: Path, *, cut_to_size: bool = False) -> nn.Module:
    """Return a model with the tensors of ``state``, in evaluation mode."""
    try:
        shapes = shapes_of(model)
        load(model, cut(state, shapes) if cut_to_size else state)
    except (ValueError, KeyError) as error:
        raise UserError(f"model.safetensors in {folder} does not belong to its model.json: {error}") from None
    return model.eval()
