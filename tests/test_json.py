"""JSON files: their bytes, and the memory of writing them."""

import json
import tracemalloc

from pipeline.io import atomic


def test_json_is_written_part_by_part(tmp_path):
    content = {"é": [list(range(1000))] * 200, "none": None}
    tracemalloc.start()
    atomic.write_json(tmp_path / "file.json", content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    found = (tmp_path / "file.json").read_bytes()
    assert found == (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    assert peak < len(found) / 4
