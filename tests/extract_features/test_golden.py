"""Golden features: a change of the computation must raise EXTRACTION_VERSION, or caches would be wrong.

`python -m tests.extract_features.test_golden` rewrites the file for a new version. The tolerance, 0.3 % of a
component and of the layer's largest, is that of another processor's float32 and of float16 storage, well below what
any change of image scaling, noise, timestep, prompts, layers, basis or pooling does.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from pipeline.feature_store import FeatureSet
from stages.extract_features.plan import EXTRACTION_VERSION
from tests.extract_features.fixtures import extract, project

GOLDEN = Path(__file__).parent / "golden.json"
IMAGE_SIZE = 40  # differs from the stored size, and gives latents whose side is not a multiple of 8
COLUMNS = [0, 1, 5, 20, 63, 64, 65, 80, 111, 112, 113, 130, 143]  # of 64 + 48 + 32


def compute(root: Path) -> dict[str, list]:
    rows = FeatureSet(extract(project(root, images=20, image_size=IMAGE_SIZE, negatives="all"))).read(
        np.arange(0, 20, 7)
    )
    return {
        "denoised": rows.denoised[:, COLUMNS].astype(float).round(4).tolist(),
        "prompted": rows.prompted[:, 3][:, COLUMNS].astype(float).round(4).tolist(),
    }


def test_features_equal_the_golden_features(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    again = "raise EXTRACTION_VERSION and params.yaml's version, then run python -m tests.extract_features.test_golden"
    assert golden["extraction_version"] == EXTRACTION_VERSION, again
    for name, values in compute(tmp_path / "p").items():
        expected = np.array(golden[name])
        tolerance = 3e-3 * (np.abs(expected) + np.abs(expected).max())
        assert (np.abs(np.array(values) - expected) <= tolerance).all(), f"{name} features changed: {again}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        content = {"extraction_version": EXTRACTION_VERSION, **compute(Path(folder) / "p")}
    GOLDEN.write_text(json.dumps(content) + "\n")
