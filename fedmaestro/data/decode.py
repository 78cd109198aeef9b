"""Image files to one array per split. Shapes: N examples, C channels, H height, W width."""

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from fedmaestro.data.sources import EncodedBatch, EncodedSplit
from fedmaestro.errors import UserError

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]  # images (N, C, H, W), labels (N,)
Shape = tuple[int, ...]


def decode_split(split: EncodedSplit, mode: str, advance: Callable[[int], None], shape: Shape | None = None) -> Arrays:
    """Return the images (N, C, H, W) uint8 and labels (N,) of a split.

    One thread on purpose: on images this small, two threads that share the interpreter's lock are slower than
    one (CIFAR-10's 10,000 test JPEGs: 0.8 s with one, 1.2 s with two).

    Args:
        split: the encoded examples.
        mode: PIL's mode to convert to, "L" or "RGB".
        advance: called with the number of images decoded since its last call.
        shape: (C, H, W) that every image must have; by default that of the first one.

    Raises:
        UserError: the split is empty, an image cannot be decoded, or the shapes of the images differ.

    """
    images = np.empty((0,), np.uint8)
    labels = np.empty(split.num_examples, np.int64)
    done = 0
    for batch in split.batches:
        decoded = _decode_batch(batch, mode, shape)
        if done == 0 and decoded:  # a file without rows may come first
            shape = decoded[0].shape
            images = np.empty((split.num_examples, *shape), np.uint8)
        end = done + len(decoded)
        images[done:end], labels[done:end] = decoded, batch.labels
        done = end
        advance(len(decoded))
    if done == 0:
        raise UserError(f"{split.origin} holds no examples")
    return images, labels


def _decode_batch(batch: EncodedBatch, mode: str, shape: Shape | None) -> list[npt.NDArray[np.uint8]]:
    decoded = []
    for row, encoded in enumerate(batch.images, batch.first_row):
        image = decode(encoded, mode, f"{batch.origin} row {row}")
        shape = shape or image.shape
        if image.shape != shape:
            raise UserError(f"{batch.origin} row {row}: image of shape {image.shape}, others have {shape}")
        decoded.append(image)
    return decoded


def decode(encoded: bytes, mode: str, where: str) -> npt.NDArray[np.uint8]:
    """Return one image as (C, H, W), upright and opaque, in 8 bits."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
        image.load()
        if image.mode.startswith("I;16"):
            image = _in_8_bits(image)
        elif image.mode in ("I", "F"):
            kind = "floating-point" if image.mode == "F" else "32-bit integer"
            raise UserError(f"{where}: {kind} pixels have no range of their own: store the images in 8 or 16 bits")
        elif image.has_transparency_data:
            image = _opaque(image, where)
        pixels = np.asarray(image if image.mode == mode else image.convert(mode), np.uint8)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{where}: cannot decode the image: it is no image file that Pillow knows") from None
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error, …
        raise UserError(f"{where}: cannot decode the image: {' '.join(str(error).split())}") from error
    return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Return a 16-bit grey image in 8 bits: PIL's own conversion would clip all values above 255."""
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _opaque(image: Image.Image, where: str) -> Image.Image:
    """Return an image without its alpha channel, which must not hide anything."""
    colours = image.convert("RGBA")
    if np.asarray(colours.getchannel("A")).min() < 255:
        raise UserError(
            f"{where}: the image has transparent pixels, and nothing says what is behind them: flatten the images"
        )
    return colours.convert("RGB")
