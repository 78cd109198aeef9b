"""Own data without code: tables, parquet files, folders of images and datasets of the hub, by name and columns.

``data.name`` says the kind, ``data.file`` where it lies (the training examples, or training and test examples) and
``data.columns`` what is what. From Python, the same functions make what ``@extend.dataset`` functions return.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedmaestro.data.own import Array, OwnRow
from fedmaestro.errors import UserError, check_name
from fedmaestro.places import absolute

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
_COLUMNS = ("target", "inputs", "groups", "task", "classes", "standardize", "test_share")
Form = dict[str, Any]


def csv(train: str | Path, test: str | Path | None = None, **columns: Any) -> Form:
    """Return the data of CSV files; numbers are brought to mean 0 and standard deviation 1, texts become categories.

    Args:
        train: the training examples.
        test: the test examples; None: a share of the training examples (``test_share``).
        columns: ``target``, ``inputs``, ``groups`` and what else ``data.own.FORM`` has.
    """
    import pandas as pd

    tables = {"train": _checked(train), **({} if test is None else {"test": _checked(test)})}
    try:
        read = {split: pd.read_csv(path) for split, path in tables.items()}
    except (ValueError, OSError) as error:
        raise UserError(f"data.file: cannot read {', '.join(map(str, tables.values()))} as CSV: {error}") from None
    return {**read, "standardize": True, **columns}


def parquet(train: str | Path, test: str | Path | None = None, **columns: Any) -> Form:
    """Return the data of parquet files: columns of numbers, of token lists or of images; see ``csv``."""
    import datasets

    files = {"train": str(_checked(train)), **({} if test is None else {"test": str(_checked(test))})}
    try:
        read = datasets.load_dataset("parquet", data_files=files)
    except Exception as error:
        raise UserError(f"data.file: cannot read {', '.join(files.values())} as parquet: {_line(error)}") from None
    return {**read, **columns}


def hub(name: str, **columns: Any) -> Form:
    """Return a dataset of the Hugging Face hub (or of a local folder in its layout) with the splits train and test."""
    import datasets

    try:
        read = datasets.load_dataset(name)
    except Exception as error:
        raise UserError(f"data.file: cannot load {name!r} from the hub: {_line(error)}") from None
    if "train" not in read:
        raise UserError(f"data.file: {name!r} has the splits {', '.join(read)}, and no train")
    return {split: read[split] for split in ("train", "test") if split in read} | columns


def image_folder(train: str | Path, test: str | Path | None = None, **columns: Any) -> Form:
    """Return the images of a folder with a folder for each class, or of its folders ``train`` and ``test``.

    Args:
        train: the folder; where it has ``train`` (and ``test``), those are the splits.
        test: the folder of the test images; None: see ``train``, else a share of the training images.
        columns: what else ``data.own.FORM`` has.
    """
    folder = _checked(train)
    splits = {"": folder}
    if (folder / "train").is_dir():
        splits[""] = folder / "train"
        splits |= {"_test": folder / "test"} if (folder / "test").is_dir() else {}
    if test is not None:
        splits["_test"] = _checked(test)
    found = {split: _files(path) for split, path in splits.items()}
    mode = _mode([path for files in found.values() for path, _ in files])
    form: Form = {}
    for split, files in found.items():
        images, labels = _decoded(files, mode), [label for _, label in files]
        form |= {f"x{split}": images, f"y{split}": np.array(labels)}
    return {**form, **columns}


def _files(folder: Path) -> list[tuple[Path, str]]:
    """Return the image files of a folder with their classes, in order."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [
        (path, kind.name) for kind in classes for path in sorted(kind.rglob("*")) if path.suffix.lower() in _IMAGES
    ]
    if len(classes) < 2 or not files:
        inside = ", ".join(path.name for path in sorted(folder.iterdir())[:8]) or "nothing"
        raise UserError(f"data.file: {folder} has no folder for each class with images in it: it holds {inside}")
    if empty := [kind.name for kind in classes if not any(label == kind.name for _, label in files)]:
        raise UserError(f"data.file: {folder / empty[0]} holds no images")
    return files


def _mode(paths: list[Path]) -> str:
    """Return grey if all images are, else colour (PIL's words)."""
    from PIL import Image

    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode not in ("1", "L", "LA", "I;16", "I;16B", "I", "F"):
                    return "RGB"
        except OSError:
            return "RGB"  # decoding says what is wrong with it
    return "L"


def _decoded(files: list[tuple[Path, str]], mode: str) -> Array:
    from fedmaestro.data.decode import decode

    images: list[Array] = []
    for path, _ in files:
        image = decode(path.read_bytes(), mode, str(path))
        if images and image.shape != images[0].shape:
            raise UserError(
                f"{path}: image of shape {image.shape}, others have {images[0].shape}: bring them to one size"
            )
        images.append(image)
    return np.stack(images)


KINDS: Mapping[str, tuple[Callable[..., Form], str]] = {
    "csv": (csv, "CSV files (data.file: training, or training and test), columns by data.columns"),
    "parquet": (parquet, "parquet files with numbers, tokens or images, columns by data.columns"),
    "hub": (hub, "a dataset of the Hugging Face hub by its name (data.file), columns by data.columns"),
    "image-folder": (image_folder, "a folder with a folder of images for each class (data.file)"),
}
"""Rows of ``DATASETS`` that need ``data.file``."""


def file_row(name: str, file: str | None, columns: str) -> OwnRow:
    """Return the row of a kind for files.

    Args:
        name: a key of ``KINDS``.
        file: ``data.file``; two files separated by a space are training and test examples.
        columns: ``data.columns``.

    Raises:
        UserError: no file, or columns that cannot be read.
    """
    import shlex

    if not file:
        raise UserError(f"data.name={name!r} needs data.file: {KINDS[name][1]}")
    words = shlex.split(file)
    if len(words) > 2 or (name == "hub" and len(words) > 1):
        raise UserError(
            f"data.file={file!r}: one file, or the training and the test examples; quote a path with spaces"
        )
    options = parse_columns(columns)
    make = KINDS[name][0]
    return OwnRow(name=name, load=lambda: make(*words, **options), summary=KINDS[name][1])


def parse_columns(text: str) -> dict[str, Any]:
    """Parse ``target=label inputs=a,b groups=user``."""
    options: dict[str, Any] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"data.columns={text!r}: write KEY=VALUE, for example target=label inputs=a,b groups=user")
        check_name("key in data.columns", key, _COLUMNS)
        options[key] = _parsed(key, value)
    return options


def _parsed(key: str, value: str) -> Any:
    if key in ("inputs", "classes") and not (key == "classes" and value.isdecimal()):
        return value.split(",")
    if key == "classes":
        return int(value)
    if key == "standardize":
        if value not in ("true", "false"):
            raise UserError(f"data.columns: standardize={value}: true or false")
        return value == "true"
    return float(value) if key == "test_share" else value


def _checked(path: str | Path) -> Path:
    path = absolute(path)
    if not path.exists():
        raise UserError(f"data.file: {path} does not exist")
    return path


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
