"""Training on one machine: the schema of ``fedmaestro train``."""

from typing import Annotated, Literal

from pydantic import Field

from fedmaestro.config.base import FilesSetting, HeldOut, PathSetting, Positive, Settings, Table, Unset, UseSetting

ALL = Unset("all")
"""Unset: no limit, all examples."""

Fraction = Annotated[float, Field(ge=0, lt=1)]


class TrainingData(Table):
    """Which examples."""

    name: str = Field("digits", description="dataset (`fedmaestro list datasets`)")
    dir: PathSetting = Field(None, description="folder of local files; empty: $FEDMAESTRO_DATA_DIR, or the hub")
    file: FilesSetting = Field(
        "",
        description="for name = csv, parquet, image-folder or hub: what to read; two words: training and test examples",
    )
    columns: str = Field(
        "", description="for these: what is what, for example target=label inputs=a,b groups=user standardize=true"
    )
    task: Annotated[str | None, Unset("default")] = Field(
        None, description="what is learnt (`fedmaestro list tasks`); default: what the dataset is for"
    )
    metrics: Annotated[str | None, Unset("default")] = Field(
        None,
        description="what is measured (`fedmaestro list metrics`), separated by spaces, the main one first; default: "
        "the task's own",
    )
    limit: Annotated[Positive | None, ALL] = Field(
        None, description="use only this many training examples, drawn by the seed, or all"
    )
    test_limit: Annotated[Positive | None, ALL] = Field(
        None, description="score only this many test examples, the first, or all (for smoke runs)"
    )
    validation: HeldOut = Field(
        0,
        description="training examples held out and scored after each epoch: so many, or below 1 this part of all; 0: "
        "the test set is",
    )
    min_count: Positive = Field(
        3, description="multi30k: tokens that are rarer in the training sentences become unknown"
    )
    augment: str = Field("none", description="random changes of training examples (`fedmaestro list augmentations`)")
    normalize: Literal["dataset", "unit"] = Field(
        "dataset",
        description="pixels of images: dataset: minus the training images' mean, over their standard deviation; unit: "
        "over 255 only",
    )


class TrainedModel(Table):
    """The network."""

    name: str = Field("mlp", description="model (`fedmaestro list models`)")
    form: Literal["lod", "dense"] = Field("lod", description="lod: Maestro; dense: the plain network, to compare with")
    keep_dense: str = Field("none", description="layers that are not factorised: first-conv, head, none or names")


class Optimisation(Table):
    """Maestro's training (ICML 2024, Algorithm 1)."""

    epochs: Positive = Field(20, description="passes over the training examples")
    batch_size: Positive = Field(64, description="examples per step")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd (with momentum) or adamw")
    lr: float = Field(0.05, gt=0, description="learning rate")
    schedule: Literal["constant", "cosine", "steps"] = Field(
        "cosine", description="constant, cosine to zero, or ×0.1 after half and three quarters of the epochs"
    )
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear warm-up")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(1e-4, ge=0, description="on all parameters, as in the authors' release")
    clip_norm: float = Field(2.0, ge=0, description="largest norm of a step's gradient; 0: no clipping")
    label_smoothing: Fraction = Field(0.0, description="label smoothing of the cross-entropy")
    sampling: Literal["pairs", "independent", "none"] = Field(
        "pairs", description="ranks of a step: pairs (Maestro), independent (uniform per layer) or none (full)"
    )
    full_pass: bool = Field(
        False, description="also run the full ranks in each step; the sampled ones learn from its soft targets"
    )
    group_lasso: float = Field(0.0, ge=0, description="weight λ of the hierarchical group lasso")
    shrink_threshold: float = Field(
        1e-5, ge=0, description="cut columns of less importance after each epoch; 0: never cut"
    )
    device: str = Field("cpu", description="PyTorch device: cpu or cuda")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the forward pass (autocast)")


class Curve(Table):
    """The accuracy–cost curve at the end."""

    calibration: Positive = Field(2048, description="training examples of the rank search's loss")
    level_ratio: float = Field(
        0.85,
        gt=0,
        lt=1,
        description="ratio of neighbouring ranks that the search tries: smaller is faster, coarser",
    )
    fractions: str = Field(
        "1 0.75 0.5 0.4 0.3 0.25 0.2 0.15 0.1 0.075 0.05",
        description="budgets: parts of the dense model's MACs, separated by spaces",
    )
    latency: bool = Field(True, description="measure each model's latency on this machine")
    latency_batch: Positive = Field(64, description="examples of a measured forward pass")


class TrainingConfig(Settings):
    """One training run; its resolved form is written to ``config.toml`` in the run folder."""

    seed: int = Field(0, ge=0, lt=2**32, description="the one seed")
    out: PathSetting = Field(None, description="run folder; empty: a new one under runs/")
    use: UseSetting = Field(
        "",
        description="files (relative to this one) or modules of your own code, separated by spaces; they add rows to "
        "the tables (`fedmaestro.extend`)",
    )
    data: TrainingData = TrainingData()
    model: TrainedModel = TrainedModel()
    train: Optimisation = Optimisation()
    curve: Curve = Curve()
