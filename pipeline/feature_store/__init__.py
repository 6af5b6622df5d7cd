"""The feature set on disk: all that stage 1 and stage 2 share. Nothing else knows this layout.

A feature set is a folder:

    manifest.json     what decides the features ("content", hashed into the fingerprint), what made them
                      ("provenance"), and per file its rows, bytes and SHA-256; format version 1
    basis.h5          per layer: mean (C,), components (d, C), explained_variance (d,), total_variance ();
                      and mean (D,), std (D,) of the denoising representations of the basis images; all float64
    shard-00000.h5    index int64 (n,), label int64 (n,), denoised float16 (n, D), prompted float16 (n, P, D),
    shard-00001.h5    prompt_class int16 (n, P), crc32 uint32 (n,); attribute fingerprint
    ...

`index` counts from 0 in the training split; shard k holds the rows k*rows_per_shard and on. `prompt_class` counts in
the manifest's list of prompts: that of a class is its label; in a self-supervised set the positive prompt is 0.
Datasets are contiguous and uncompressed: a row is then a slice of the file and is read through a memory map at memory
speed, which filters and chunks would prevent (they also save little on dense float16). `crc32` covers the other fields
of its row, so that a flipped bit is noticed by whoever reads the row, without hashing the file.

Files appear whole or not at all: each is written under a temporary name, closed, synced and renamed, then its entry is
written beside it. A set that is being made has no manifest, only files and entries, so that many processes may add to
it without a common file; the manifest is put together of the entries once all are there, and is then the same whoever
made which shard. No pickle anywhere.
"""

from pipeline.feature_store.reader import FeatureSet, read_basis, read_basis_file, read_manifest
from pipeline.feature_store.schema import (
    Basis,
    Content,
    Features,
    FileEntry,
    LayerBasis,
    Manifest,
    Plan,
    positive_columns,
)
from pipeline.feature_store.writer import FeatureSetWriter, write_basis_file

__all__ = [
    "Basis",
    "Content",
    "FeatureSet",
    "FeatureSetWriter",
    "Features",
    "FileEntry",
    "LayerBasis",
    "Manifest",
    "Plan",
    "positive_columns",
    "read_basis",
    "read_basis_file",
    "read_manifest",
    "write_basis_file",
]
