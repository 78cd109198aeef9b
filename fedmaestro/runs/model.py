"""Model artefacts on disk as modules: ``model.safetensors`` holds the tensors, ``model.json`` what rebuilds them."""

from pathlib import Path
from typing import Any

from torch import nn

from fedmaestro import lod
from fedmaestro.runs.checkpoint import read_model
from fedmaestro.errors import UserError, check_name
from fedmaestro.models import MODELS
from fedmaestro.models.architecture import Architecture, Size
from fedmaestro.submodel import State, cut, load


def load_model(folder: str | Path, tier: str | None = None) -> nn.Module:
    """Return the model that a run, a training or an extraction left in ``folder``, in evaluation mode.

    Args:
        folder: holds ``model.safetensors`` and ``model.json``.
        tier: cut the model of a federation to what serves this tier; None: the whole one.

    Raises:
        UserError: no readable model, an unknown tier, or tensors that do not belong to the card.
    """
    state, card = read_model(Path(folder))
    architecture = architecture_of(card, Path(folder))
    check_tier(card, tier, Path(folder))
    if owners := card.get("separate"):
        # Each size is a model of its own (``sharing``): there is no whole one.
        if tier is None:
            raise UserError(f"the tiers of {folder} are separate models: name one of {', '.join(owners)}")
        owner = f"{owners[tier]}/"
        state = {name.removeprefix(owner): tensor for name, tensor in state.items() if name.startswith(owner)}
    try:
        size = Size.from_json(card["size"] if tier is None else card["tiers"][tier])
        model = architecture.build(size)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"model.json in {folder} is no model card: it gives no usable size: {reason}") from None
    if card.get("recomposed"):
        model = lod.recompose(model)
    return filled(model, state, Path(folder), cut_to_size=tier is not None)


def filled(model: nn.Module, state: State, folder: Path, *, cut_to_size: bool = False) -> nn.Module:
    """Return a ``meta`` model on the CPU with the tensors of ``state``."""
    model = model.to_empty(device="cpu")
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        load(model, cut(state, shapes) if cut_to_size else state)
    except (ValueError, KeyError) as error:
        raise UserError(f"model.safetensors in {folder} does not belong to its model.json: {error}") from None
    return model.eval()


def architecture_of(card: dict[str, Any], folder: Path) -> Architecture:
    """Return the architecture that ``model.json`` names.

    Raises:
        UserError: keys are missing, or this version does not know the model.
    """
    try:
        architecture = Architecture(
            name=card["model"],
            input_shape=tuple(card["input_shape"]),
            num_classes=card["num_classes"],
            form=card["form"],
            keep_dense=card["keep_dense"],
            norm=card.get("norm", "group"),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"model.json in {folder} is no model card: {type(error).__name__} {error}") from None
    check_name("model", architecture.name, MODELS, f" in {folder}/model.json")
    check_name("form", architecture.form, ("lod", "dense"), f" in {folder}/model.json")
    return architecture


def check_tier(card: dict[str, Any], tier: str | None, folder: Path) -> None:
    """Raise UserError unless ``tier`` is None or one that the card knows."""
    if tier is None:
        return
    if not isinstance(card.get("tiers"), dict):
        raise UserError(f"model.json in {folder} is no model card of a federation: it has no tiers")
    check_name("tier", tier, card["tiers"], f" in {folder}")
