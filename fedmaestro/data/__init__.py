"""Image and translation datasets and their partitions over devices.

`load_dataset` gives memory-mapped arrays (embedded digits, local parquet files or the hub) that are decoded
once, `load_translation` does so for pairs of sentences; `cached_partition` says which device holds which
training example. Heavy libraries (datasets, flwr-datasets, scikit-learn, pyarrow) are imported only to build
something that the cache does not have.
"""

from fedmaestro.data.load import DATASETS, DatasetRow, ImageDataset, data_folder, load_dataset, normalize
from fedmaestro.data.partition import PARTITIONS, cached_partition, class_counts, partition
from fedmaestro.data.parts import DealtParts, Parts
from fedmaestro.data.sources import TRANSLATION
from fedmaestro.data.translation import TranslationDataset, TranslationSplit, load_translation

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "TRANSLATION",
    "DatasetRow",
    "DealtParts",
    "ImageDataset",
    "Parts",
    "TranslationDataset",
    "TranslationSplit",
    "cached_partition",
    "class_counts",
    "data_folder",
    "load_dataset",
    "load_translation",
    "normalize",
    "partition",
]
