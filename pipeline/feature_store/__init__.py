"""The feature set on disk: all that extraction and training share. No other package knows its layout.

Open one by its path, a `str` or a `Path`; `FeatureSet` shows how to index it:

    features = FeatureSet("data/features/digits-tiny-sd-t300")
    rows = features[:64]                                           # rows.denoised (64, D), rows.prompted (64, P, D)
    rows.denoised[:, features.columns("up_blocks.1")]              # one layer
    DataLoader(features.as_torch(), batch_size=64, shuffle=True)   # batches of tensors

A feature set is a folder:

    manifest.json     what determines the features ("content", hashed into the fingerprint), what made them
                      ("provenance"), and per file its rows, bytes and SHA-256; format version 1, or 2
                      if the representations are stored as int8, or 3 if they have noise
    basis.h5          per layer: mean (C,), components (d, C), explained_variance (d,), total_variance ();
                      and mean (D,), std (D,) of the denoising representations of the basis images; all float64
    shard-00000.h5    index int64 (n,), label int64 (n,), denoised float16 (n, D), prompted float16 (n, P, D),
    shard-00001.h5    prompt_class int16 (n, P), crc32 uint32 (n,); attribute fingerprint
    ...

- With `storage: int8`, denoised and prompted are int8 (`int8`); they are read as float16, too.
- A set with noise (`noise`) is a copy for others, which `pipeline features export --noise` made. Its content is that of
  its source and the noise: `Content.added_noise`.
- `index` counts from 0 in the training split; shard k holds the rows from k * rows_per_shard on.
- `prompt_class` counts in the manifest's list of prompts. The prompt of a class has the number of its label; in a
  self-supervised set, prompt 0 matches every image.
- Datasets are contiguous and uncompressed, so that a row is a slice of the file and is read through a memory map at
  memory speed. Chunks and filters would prevent that, and would save little on dense float16.
- `crc32` covers the other fields of its row, so that a flipped bit is noticed when the row is read, without hashing the
  file.
- Files are written atomically: under a temporary name, closed, synced and renamed; then the file's entry is written.
  An unfinished set has no manifest, only files and entries, so that many processes can add to it without sharing a
  file. Once all entries exist, the manifest is assembled from them; it does not depend on which process wrote which
  shard.
- Nothing is pickled.

Functions raise SystemRefusal where the operating system refuses to read a file: its content is then unknown, so it is
neither reported as damaged nor discarded.
"""

from pipeline.feature_store.reader import FeatureSet, read_basis, read_basis_file, read_manifest
from pipeline.feature_store.schema import (
    Basis,
    Content,
    Features,
    FileEntry,
    InvalidFeatureSet,
    LayerBasis,
    Manifest,
    Noise,
    Plan,
    positive_matches,
)
from pipeline.feature_store.writer import FeatureSetWriter, write_basis_file

__all__ = [
    "Basis", "Content", "FeatureSet", "FeatureSetWriter", "Features", "FileEntry", "InvalidFeatureSet", "LayerBasis",
    "Manifest", "Noise", "Plan", "positive_matches", "read_basis", "read_basis_file", "read_manifest",
    "write_basis_file",
]  # fmt: skip
