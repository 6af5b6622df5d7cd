"""The feature store: rows are read back as written, and damaged or mismatched files are rejected."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline import provenance
from pipeline.errors import FeatureSetError, PipelineError
from pipeline.feature_store import (
    Basis,
    Content,
    Features,
    FeatureSet,
    FeatureSetWriter,
    LayerBasis,
    Plan,
    comparison,
    shards,
    verification,
)
from pipeline.feature_store.int8 import Int8
from tests.faults.kernel import in_child

ROWS, PER_SHARD, P, D = 10, 4, 3, 5


def content(**changes):
    values = dict(
        extraction_version=1, dataset_hash="d", class_names=["a", "b", "c"], backbone={}, timestep=300, image_size=32,
        layers={"up_blocks.1": [0, D]}, prompts=[["a"], ["b"], ["c"]], positive="label", denoise_prompt="",
        negatives="all", noise_seed=0, basis_images=4, basis_sha256=None, image_conditioning=None, dtype="float32",
    )  # fmt: skip
    return Content(**(values | changes))


def open_writer(staging, **changes):
    return FeatureSetWriter(staging, Plan(content(**changes), ROWS, PER_SHARD, {}), "a processor")


def features(rows: range) -> Features:
    rng = np.random.default_rng(rows.start)
    n = len(rows)
    return Features(
        np.array(rows), np.arange(n) % 3, rng.normal(size=(n, D)).astype(np.float16),
        rng.normal(size=(n, P, D)).astype(np.float16), np.tile(np.arange(P, dtype=np.int16), (n, 1)),
    )  # fmt: skip


def write(staging, target=None, shards=(0, 1, 2), redone=0, **changes):
    writer = open_writer(staging, **changes)
    if not writer.has_basis():
        layer = LayerBasis(np.zeros(D), np.eye(D), np.ones(D), float(D))
        writer.write_basis(Basis({"up_blocks.1": layer}, np.zeros(D), np.ones(D)))
    for shard in shards:
        if shard in writer.missing_shards:
            writer.write_shard(shard, features(writer.plan.shard_rows(shard)), redone)
    if target:
        writer.publish(target)
    return writer


def forge(path, manifest=lambda said: None, shard=lambda h5, number: None, basis=lambda h5: None):
    """Change a set as a hostile author would: with the fingerprint and every checksum corrected."""
    said = json.loads((path / "manifest.json").read_text())
    manifest(said)
    said["fingerprint"] = provenance.fingerprint(said["content"])
    for key, entry in {"": said["basis"], **said["shards"]}.items():
        file = path / entry["file"]
        content = file.read_bytes()
        file.unlink()  # it is linked with the staging folder's
        file.write_bytes(content)
        with h5py.File(file, "r+") as h5:
            h5.attrs["fingerprint"] = said["fingerprint"]
            if key:
                shard(h5, int(key))
                h5["crc32"][...] = Features(**{name: h5[name][...] for name in Features.__annotations__}).crc32()
            else:
                basis(h5)
        entry |= {"bytes": file.stat().st_size, "sha256": provenance.file_sha256(file)}
    (path / "manifest.json").unlink()
    (path / "manifest.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    write(root / "staging", root / "set")
    return root / "set"


@pytest.fixture
def copied(original, tmp_path):
    return shutil.copytree(original, tmp_path / "set")


def test_rows_are_returned_in_the_requested_order(tmp_path):
    write(tmp_path / "staging", tmp_path / "set")
    got = FeatureSet(tmp_path / "set").read(np.array([9, 0, 5]))
    assert got.index.tolist() == [9, 0, 5]
    assert np.array_equal(got.denoised[1], features(range(0, 4)).denoised[0])
    assert np.array_equal(got.prompted[2], features(range(4, 8)).prompted[1])
    assert verification.problems(tmp_path / "set", full=True) == []


def test_interrupted_set_resumes_to_identical_bytes(tmp_path):
    write(tmp_path / "a", tmp_path / "complete")
    write(tmp_path / "b", shards=[0])
    assert open_writer(tmp_path / "b").missing_shards == [1, 2]
    write(tmp_path / "b", tmp_path / "resumed")
    for file in (tmp_path / "complete").iterdir():
        assert file.read_bytes() == (tmp_path / "resumed" / file.name).read_bytes()


def test_flipped_bit_is_reported(tmp_path):
    write(tmp_path / "staging", tmp_path / "set")
    shard = tmp_path / "set" / "shard-00001.h5"
    data = bytearray(shard.read_bytes())
    needle = features(range(4, 8)).denoised[2].tobytes()
    data[data.index(needle)] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    with pytest.raises(PipelineError, match=r"shard-00001.h5: row 2 is corrupt"):
        FeatureSet(tmp_path / "set").read(np.arange(ROWS))


def test_truncated_shard_is_reported(tmp_path):
    write(tmp_path / "staging", tmp_path / "set")
    shard = tmp_path / "set" / "shard-00002.h5"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(PipelineError, match=r"shard-00002.h5 has \d+ bytes"):
        FeatureSet(tmp_path / "set")


def test_shard_of_another_set_is_reported(tmp_path):
    write(tmp_path / "a", tmp_path / "ours")
    write(tmp_path / "b", tmp_path / "theirs", timestep=100)
    (tmp_path / "ours" / "shard-00000.h5").unlink()
    (tmp_path / "theirs" / "shard-00000.h5").rename(tmp_path / "ours" / "shard-00000.h5")
    with pytest.raises(PipelineError, match="belongs to another feature set"):
        FeatureSet(tmp_path / "ours").read(np.array([0]))


def test_incomplete_or_missing_set_is_reported(tmp_path):
    write(tmp_path / "staging", tmp_path / "set")
    with pytest.raises(PipelineError, match="holds no feature set"):
        FeatureSet(tmp_path / "nowhere")
    manifest = tmp_path / "set" / "manifest.json"
    text = json.loads(manifest.read_text())
    del text["shards"]["1"]
    manifest.unlink()
    manifest.write_text(json.dumps(text))
    with pytest.raises(PipelineError, match="2 of 3 shards"):
        FeatureSet(tmp_path / "set")


def test_infinite_features_are_rejected(tmp_path):
    writer = write(tmp_path / "staging", shards=[])
    broken = features(range(0, 4))
    broken.denoised[0, 0] = np.inf
    with pytest.raises(PipelineError, match="not finite"):
        writer.write_shard(0, broken, 0)


def test_several_writers_make_the_same_set_as_one(tmp_path):
    write(tmp_path / "alone", tmp_path / "by_one", redone=2)
    write(tmp_path / "staging", shards=[2], redone=2)
    write(tmp_path / "staging", shards=[0], redone=2)
    write(tmp_path / "staging", tmp_path / "by_many", redone=2)
    for file in (tmp_path / "by_one").iterdir():
        assert file.read_bytes() == (tmp_path / "by_many" / file.name).read_bytes()
    manifest = FeatureSet(tmp_path / "by_many").manifest
    assert manifest.redone_in_float32 == 6 and manifest.provenance["hardware"] == ["a processor"]


def test_writers_that_start_at_once_write_one_plan(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        for attempt in range(20):
            together = threading.Barrier(8)

            def start(_, staging=tmp_path / str(attempt), together=together):
                together.wait()
                return open_writer(staging)

            list(pool.map(start, range(8)))
            assert [file.name for file in (tmp_path / str(attempt)).glob("plan*")] == ["plan.json"]


def test_damaged_shard_counts_as_missing(tmp_path):
    writer = write(tmp_path / "staging")
    shard = tmp_path / "staging" / "shard-00001.h5"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert writer.missing_shards == []  # of the right size
    writer.forget_damaged(range(3))
    assert writer.missing_shards == [1]
    shard.write_bytes(data[:-1])
    assert writer.missing_shards == [1]


def test_shards_of_an_earlier_basis_count_as_missing(tmp_path):
    writer = write(tmp_path / "staging")
    layer = LayerBasis(np.ones(D), np.eye(D), np.ones(D), float(D))
    writer.write_basis(Basis({"up_blocks.1": layer}, np.zeros(D), np.ones(D)))
    assert writer.missing_shards == [0, 1, 2]


def test_lock_excludes_other_writers_until_it_is_released(tmp_path):
    one, other = open_writer(tmp_path / "staging"), open_writer(tmp_path / "staging")
    with one.lock("shard-00000") as held:
        assert held
        with other.lock("shard-00000", wait=False) as also_held:
            assert not also_held
    with other.lock("shard-00000", wait=False) as held:
        assert held


def test_matching_prompt_is_that_of_the_label_or_the_first(tmp_path):
    for positive, expected in (("label", [0, 1, 2, 0]), ("first", [0, 0, 0, 0])):
        write(tmp_path / positive, tmp_path / f"{positive}-set", positive=positive)
        opened = FeatureSet(tmp_path / f"{positive}-set")
        assert opened.positive_prompts(opened.read(np.arange(4))).tolist() == expected


def test_file_size_limit_gives_one_line_and_keeps_finished_shards(tmp_path):
    writer = write(tmp_path / "staging", shards=[0])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(PipelineError, match=r"shard-00001.h5 cannot be written \(File too large\)"):
            writer.write_shard(1, features(range(4, 8)), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "staging").glob("*.tmp"))
    assert writer.missing_shards == [1, 2]
    write(tmp_path / "staging", tmp_path / "set")
    assert verification.problems(tmp_path / "set", full=True) == []


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small file system needs root")
def test_full_disk_gives_one_line_and_keeps_finished_shards(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        write(small / "staging", shards=[0])
        (small / "filler").write_bytes(bytes(shutil.disk_usage(small).free - 8192))
        writer = open_writer(small / "staging")
        with pytest.raises(PipelineError, match="No space left on device.*Make room on the disk and run again"):
            for shard in (1, 2):
                writer.write_shard(shard, features(writer.plan.shard_rows(shard)), 0)
        (small / "filler").unlink()
        write(small / "staging", tmp_path / "set")
        assert verification.problems(tmp_path / "set", full=True) == []
    finally:
        subprocess.run(["umount", small], check=True)


def put(*path, value):
    *parents, last = path

    def change(said):
        for key in parents:
            said = said[key]
        said[last] = value

    return change


def moved(to):
    return lambda said: said["shards"].update({to: said["shards"].pop("2")})


LAYERS = ("content", "layers")
FORGED = {
    "overlapping layers": put(*LAYERS, value={"a": [0, 3], "b": [2, 5]}),
    "layers with a gap": put(*LAYERS, value={"a": [0, 2], "b": [3, 5]}),
    "layers reversed": put(*LAYERS, value={"a": [5, 0]}),
    "an empty layer": put(*LAYERS, value={"a": [0, 5], "b": [5, 5]}),
    "layers not from 0": put(*LAYERS, value={"a": [1, 5]}),
    "layers out of order": put(*LAYERS, value={"a": [2, 5], "b": [0, 2]}),
    "no prompts": put("content", "prompts", value=[]),
    "a prompt of no text": put("content", "prompts", value=[["a"], [], ["c"]]),
    "no classes": put("content", "class_names", value=[]),
    "other prompts per image": put("prompts_per_image", value=2),
    "other negatives": put("content", "negatives", value=1),
    "negatives by another word": put("content", "negatives", value="some"),
    "no negatives": put("content", "negatives", value=0),
    "shards 0, 1 and 7": moved("7"),
    "shards 0, 1 and -1": moved("-1"),
    "a shard beyond all": moved("3"),
    "a shard beyond all by its name too": lambda said: said["shards"].update(
        {"7": said["shards"].pop("2") | {"file": "shard-00007.h5", "rows": 0}}
    ),
    "one file as two shards": lambda said: said["shards"].update({"1": said["shards"]["0"]}),
    "the basis as a shard": lambda said: said["shards"].update({"1": said["basis"]}),
    "a shard as the basis": lambda said: said.update(basis=said["shards"]["0"]),
    "a shard of other rows": put("shards", "2", "rows", value=4),
    "rows beyond memory": put("rows", value=10**12),
    "rows beyond numbers": lambda said: said.update(rows=10**30, rows_per_shard=10**30),
    "bytes beyond numbers": put("shards", "2", "bytes", value=10**400),
    "a backbone that is a text": put("provenance", "backbone", value="x"),
    "no backbone": put("provenance", "backbone", value=None),
    "a revision that is a number": put("provenance", "backbone", value={"revision": 5}),
    "packages in a list": put("provenance", "packages", value=[1]),
    "hardware of numbers": put("provenance", "hardware", value=[1]),
    "no hardware": put("provenance", "hardware", value=None),
    "more provenance": put("provenance", "author", value="x"),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED.keys())
def test_inconsistent_manifest_is_rejected(copied, change):
    said = json.loads((copied / "manifest.json").read_text())
    change(said)
    said["fingerprint"] = provenance.fingerprint(said["content"])
    (copied / "manifest.json").write_text(json.dumps(said))
    with pytest.raises(PipelineError, match="is not a manifest") as caught:
        FeatureSet(copied)
    assert "\n" not in str(caught.value)
    assert [str(fault) for fault in verification.problems(copied, full=False)] == [str(caught.value)]


def test_manifest_is_written_back_unchanged(copied):
    """Validation does not change a manifest, so that an imported set has the bytes of the exported one."""
    said = put("provenance", value={"dataset": "d", "backbone": {"name": "b", "source": "s", "revision": None},
        "settings": {"timestep": 300, "layers": ["a"], "basis": {"path": "auto"}, "x": 1.5, "y": None},
        "feddifrc": "0", "commit": None, "python": "3", "packages": {"x": None}, "hardware": ["c"]})  # fmt: skip
    forge(copied, said)
    text = json.loads((copied / "manifest.json").read_text())
    again = FeatureSet(copied).manifest.model_dump_json(indent=2)
    assert again == json.dumps(text, indent=2, ensure_ascii=False)


def only(faults):
    (fault,) = faults
    return str(fault)


def test_basis_with_fewer_dimensions_than_the_manifest_is_rejected(copied):
    def narrow(h5):
        for name in ("layers/up_blocks.1/components", "layers/up_blocks.1/explained_variance", "mean", "std"):
            values = h5[name][:-1]
            del h5[name]
            h5[name] = values

    forge(copied, basis=narrow)
    assert "basis.h5 has 4 dimensions of up_blocks.1 (its manifest says 5" in only(verification.problems(copied, True))


@pytest.mark.parametrize("positive", ["label", "first"])
@pytest.mark.parametrize("prompts", [[2, 2, 2], [0, 0, 2]])
def test_row_without_exactly_one_matching_prompt_is_rejected(copied, positive, prompts):
    def change(h5, number):
        if number == 1:
            h5["label"][3] = 0
            h5["prompt_class"][3] = prompts

    forge(copied, put("content", "positive", value=positive), change)
    wrong = only(verification.problems(copied, full=False))
    assert "shard-00001.h5 has 1 rows without exactly one matching prompt, the first is row 3" in wrong
    opened = FeatureSet(copied)
    assert len(opened.positive_prompts(opened.read(np.arange(7)))) == 7
    with pytest.raises(PipelineError, match="sample 7 does not have exactly one matching prompt"):
        opened.positive_prompts(opened.read(np.arange(10)))


def test_labels_that_differ_from_the_data_set_are_rejected(copied):
    labels = np.concatenate([features(range(start, stop)).label for start, stop in ((0, 4), (4, 8), (8, 10))])
    opened = FeatureSet(copied)
    opened.expect_labels(labels)
    assert np.array_equal(opened.read(np.arange(ROWS)).label, labels)
    labels[6] = (labels[6] + 1) % 3
    opened.expect_labels(labels)
    opened.read(np.array([5, 9]))
    with pytest.raises(PipelineError, match="shard-00001.h5: sample 6 has label 2, in the data set 0"):
        opened.read(np.array([9, 6, 5]))
    with pytest.raises(PipelineError, match="holds 10 samples, but the data set has 9"):
        opened.expect_labels(labels[:9])


@pytest.mark.parametrize("rows, per_shard, line", [
    (2**31 - 1, PER_SHARD, "is incomplete \\(3 of 536870912 shards\\)"),
    (2**31 - 1, 2**31 - 1, "does not have the layout of a shard"),
])  # fmt: skip
def test_rows_claimed_by_a_manifest_are_not_allocated(copied, rows, per_shard, line):
    def claim(said):
        said |= {"rows": rows, "rows_per_shard": per_shard}
        if per_shard == rows:
            said["shards"] = {"0": said["shards"]["0"] | {"rows": rows}}
            for name in ("shard-00001.h5", "shard-00002.h5"):
                (copied / name).unlink()
        else:
            said["shards"]["2"]["rows"] = per_shard

    forge(copied, claim)
    tracemalloc.start()
    faults = verification.problems(copied, full=True)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    with pytest.raises(PipelineError, match=line):
        raise faults[0]


def test_swapped_shard_and_invalid_sample_numbers_are_rejected(copied):
    forge(copied, shard=lambda h5, number: h5["index"].__setitem__(slice(None), range(len(h5["index"]))))
    with pytest.raises(PipelineError, match="shard-00001.h5: row 2 holds sample 2, not sample 6"):
        FeatureSet(copied).read(np.array([6]))
    with pytest.raises(PipelineError, match="has no sample -1. Use samples 0 to 9"):
        FeatureSet(copied).read(np.array([-1, 3]))
    with pytest.raises(PipelineError, match="has no sample 10. Use samples 0 to 9"):
        FeatureSet(copied).read(np.array([3, 10, -1]))


@pytest.fixture
def one_second_limit():
    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["manifest.json", "basis.h5", "shard-00000.h5"])
def test_pipe_in_place_of_a_file_does_not_block(copied, one_second_limit, name):
    said = json.loads((copied / "manifest.json").read_text())
    for entry in (said["basis"], said["shards"]["0"]):
        entry["bytes"] = 0 if entry["file"] == name else entry["bytes"]
    (copied / "manifest.json").write_text(json.dumps(said))
    (copied / name).unlink()
    os.mkfifo(copied / name)
    assert f"{name} is not a regular file" in str(verification.problems(copied, full=True)[0])


@pytest.mark.usefixtures("no_garbage_collection")
def test_ctrl_c_stops_verification_at_once(copied):
    """A sparse shard of 6 GB takes seconds to hash."""
    os.truncate(copied / "shard-00001.h5", 6 << 30)
    said = json.loads((copied / "manifest.json").read_text())
    said["shards"]["1"]["bytes"] = 6 << 30
    (copied / "manifest.json").write_text(json.dumps(said))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        verification.problems(copied, full=True)
    assert time.perf_counter() - started < 1.5


def test_verification_reads_one_shard_after_another(original, monkeypatch):
    """Both checks of a shard are submitted together; the pool works in the order of submission."""
    asked, real = [], ThreadPoolExecutor.submit

    def noted(pool, check, shard):
        asked.append(shard)
        return real(pool, check, shard)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", noted)
    assert verification.problems(original, full=True) == []
    assert asked == [0, 0, 1, 1, 2, 2]


def test_replaced_shard_is_checked_again(tmp_path, monkeypatch):
    """Size, layout and row checksums are right: only the fingerprint differs."""
    monkeypatch.setitem(globals(), "PER_SHARD", 1)
    monkeypatch.setattr(shards, "_MOST_KEPT", ROWS - 1)
    for name, timestep in (("ours", 300), ("theirs", 100)):
        write(tmp_path / f"{name}-staging", tmp_path / name, range(ROWS), timestep=timestep)
    opened = FeatureSet(tmp_path / "ours")
    opened.read(np.arange(ROWS))
    replaced = tmp_path / "ours" / "shard-00000.h5"
    (tmp_path / "theirs" / "shard-00000.h5").rename(replaced)
    assert opened.read(np.arange(1, ROWS)).index.tolist() == list(range(1, ROWS))
    with pytest.raises(PipelineError, match="shard-00000.h5 belongs to another feature set"):
        opened.read(np.array([0]))


def growth(action, small, large):
    """Return how many bytes more `action` needs for the folder `large` than for `small`, in a fork."""

    def measured():
        peaks = []
        for folder in (small, large):
            action(folder)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return 1024 * (peaks[1] - peaks[0])

    return in_child(measured)


def test_memory_does_not_grow_with_the_set(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "D", 1_024)
    monkeypatch.setitem(globals(), "PER_SHARD", 2_000)
    for name, rows in (("small", 1_000), ("large", 4_000)):
        monkeypatch.setitem(globals(), "ROWS", rows)
        write(tmp_path / f"{name}-staging", tmp_path / name, range(-(-rows // PER_SHARD)))
    small, large = (
        sum(file.stat().st_size for file in tmp_path.glob(f"{name}/shard-*")) for name in ("small", "large")
    )
    for action in (lambda path: verification.problems(path, full=True), lambda path: comparison.numbers(path, path)):
        assert growth(action, tmp_path / "small", tmp_path / "large") < (large - small) / 2


DENOISED = np.concatenate([features(range(start, stop)).denoised for start, stop in ((0, 4), (4, 8), (8, 10))])


@pytest.mark.parametrize(
    "key",
    [
        slice(2, 7), slice(None, None, -3), slice(-3, None), slice(4, 4), slice(20, 30), [3, 5], [-1, 0, 0], [],
        np.array([9, 1]), np.arange(ROWS) % 2 == 0, np.zeros(ROWS, bool), [True] + [False] * 9, torch.tensor([2, 8]),
    ],
    ids=str,
)  # fmt: skip
def test_feature_set_is_indexed_like_an_array(original, key):
    expected = np.arange(ROWS)[key if not isinstance(key, torch.Tensor) else key.numpy()]
    rows = FeatureSet(original)[key]
    assert rows.index.tolist() == expected.tolist() and len(rows) == len(expected)
    assert np.array_equal(rows.denoised, DENOISED[expected]) and rows.prompted.shape == (len(expected), P, D)


@pytest.mark.parametrize("position", [0, 9, -1, -10, np.int64(3), np.int32(-2), torch.tensor(5)])
def test_integer_index_returns_one_image_without_the_row_axis(original, position):
    row = FeatureSet(original)[position]
    assert row.index == range(ROWS)[int(position)] and np.array_equal(row.denoised, DENOISED[int(position)])
    assert (row.label.shape, row.denoised.shape, row.prompted.shape, row.prompt_class.shape) == ((), (D,), (P, D), (P,))


@pytest.mark.parametrize("key", [10, -11, [3, 10], [True, False], [[1, 2]], np.array([0.5])])
def test_index_outside_the_set_raises_index_error(original, key):
    with pytest.raises(IndexError):
        FeatureSet(original)[key]


def test_iteration_yields_every_image_once_and_stops(original):
    opened = FeatureSet(original)
    assert len(opened) == ROWS and [int(row.index) for row in opened] == list(range(ROWS))
    assert [int(row.index) for row in opened[6:9]] == [6, 7, 8]


def test_repr_shows_images_layers_and_backbone(copied, monkeypatch):
    made_by = {"dataset": "digits", "backbone": {"name": "tiny-sd"}}
    forge(
        copied,
        lambda said: (put("provenance", value=made_by)(said), put(*LAYERS, value={"a": [0, 2], "b": [2, 5]})(said)),
    )
    monkeypatch.setenv("HOME", str(copied.parent))
    opened = FeatureSet("~/set")
    assert repr(opened).splitlines() == [
        "FeatureSet set: 10 images of digits, 3 classes",
        "  5 dims: a [0:2], b [2:5]; 3 prompts per image",
        f"  tiny-sd at timestep 300; fingerprint {opened.manifest.fingerprint[:12]}",
    ]
    assert (opened.name, opened.layers, opened.class_names) == ("set", ["a", "b"], ["a", "b", "c"])
    assert opened.prompts == [["a"], ["b"], ["c"]]
    assert opened[:4].denoised[:, opened.columns("b")].shape == (4, 3)
    with pytest.raises(FeatureSetError, match="set has no layer 'c'. Use one of a, b."):
        opened.columns("c")
    monkeypatch.chdir(copied)
    assert FeatureSet(".").name == "set"
    assert repr(opened[:2]).startswith("Features(index int64 (2,), label int64 (2,), denoised float16 (2, 5), prompted")


@pytest.mark.parametrize("name", ["nowhere", "~/nowhere"])
def test_error_distinguishes_a_missing_folder_from_one_without_a_set(tmp_path, name):
    with pytest.raises(FeatureSetError, match=r"nowhere holds no feature set \(the folder does not exist\). Run `pipe"):
        FeatureSet(name)
    with pytest.raises(FeatureSetError, match=r"holds no feature set \(it has no manifest.json\)"):
        FeatureSet(tmp_path)


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_data_loader_workers_read_batches(original, start, workers):
    opened = FeatureSet(original)
    opened.read(np.arange(ROWS))  # maps are open when the processes start
    loader = DataLoader(opened.as_torch(), batch_size=4, num_workers=workers, multiprocessing_context=start)
    batches = list(loader)
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(ROWS))
    assert np.array_equal(torch.cat([batch["denoised"] for batch in batches]).numpy(), DENOISED)
    shapes = {name: (tuple(values.shape), values.dtype) for name, values in batches[0].items()}
    assert shapes == {
        "index": ((4,), torch.int64), "label": ((4,), torch.int64), "denoised": ((4, D), torch.float16),
        "prompted": ((4, P, D), torch.float16), "prompt_class": ((4, P), torch.int16),
    }  # fmt: skip
    sample = opened.as_torch()[-1]
    assert sample["index"] == 9 and sample["prompted"].shape == (P, D)


def test_pickled_set_reads_the_same_rows(original):
    opened = FeatureSet(original)
    opened.expect_labels(opened[:].label)
    opened.read(np.arange(ROWS))
    again = pickle.loads(pickle.dumps(opened))
    assert np.array_equal(again[:].denoised, DENOISED)
    assert np.array_equal(again._labels, opened._labels)


def test_opening_a_set_does_not_import_torch(original):
    code = f"import sys; from pipeline.feature_store import FeatureSet; FeatureSet({str(original)!r})[0]; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_row_bytes_match_the_size_of_a_shard(original):
    with h5py.File(original / "shard-00000.h5") as h5:
        stored = sum(h5[name].nbytes for name in h5)
    assert content().row_bytes * PER_SHARD == stored == PER_SHARD * (2 * D * (1 + P) + 2 * P + 8 + 8 + 4)


def test_processes_of_a_set_agree_on_the_first_batch_size_of_their_hardware(tmp_path):
    first, second = open_writer(tmp_path), open_writer(tmp_path)
    assert first.agree_on_batch(lambda: 256) == 256
    assert second.agree_on_batch(lambda: pytest.fail("measured again")) == 256
    second._hardware = "another GPU"
    assert second.agree_on_batch(lambda: 64) == 64
    assert first.agree_on_batch(lambda: pytest.fail("forgotten")) == 256
    (first.path / "batch.json").write_text('{"a processor": "many"}')
    assert first.agree_on_batch(lambda: 32) == 32  # unusable: measured again


def test_int8_takes_half_the_bytes_and_keeps_the_numbers(tmp_path):
    exact, small = tmp_path / "exact", tmp_path / "small"
    write(tmp_path / "one", exact)
    write(tmp_path / "two", small, storage="int8")
    found, wanted = FeatureSet(small), FeatureSet(exact)
    # the basis has mean 0 and standard deviation 1, so a step is 12 / 127 and rounding is off by half
    rows, expected = found.read(np.arange(ROWS)), wanted.read(np.arange(ROWS))
    for name in ("denoised", "prompted"):
        values, exactly = getattr(rows, name), getattr(expected, name).astype(float)
        assert values.dtype == np.float16
        assert np.abs(values - exactly).max() <= 6 / 127 + 1e-3  # and by float16's own rounding
        steps = np.rint(exactly * 127 / 12) * 12 / 127
        assert np.allclose(values, steps, atol=1e-3)
    assert np.array_equal(rows.prompt_class, expected.prompt_class) and np.array_equal(rows.label, expected.label)
    assert wanted.manifest.content.row_bytes - found.manifest.content.row_bytes == (1 + P) * D
    assert (found.manifest.format_version, wanted.manifest.format_version) == (2, 1)
    assert "storage" not in wanted.manifest.content.model_dump()  # as version 1 wrote it, with the same fingerprint
    assert found.manifest.fingerprint != wanted.manifest.fingerprint
    found.verify_files()
    assert verification.problems(small, full=True) == []


def test_int8_clips_what_lies_far_out_and_keeps_constant_dimensions(tmp_path):
    layer = LayerBasis(np.zeros(2), np.eye(2), np.ones(2), 2.0)
    coder = Int8(Basis({"up_blocks.1": layer}, np.array([100.0, 50.0]), np.array([2.0, 0.0])))
    values = np.array([[100.0, 50.0], [100.0 + 24.0, 50.0], [100.0 - 400.0, 50.0]])
    assert coder.encode(values).tolist() == [[0, 0], [127, 0], [-127, 0]]
    assert np.allclose(coder.decode(coder.encode(values)), [[100, 50], [124, 50], [76, 50]], rtol=1e-3)


def test_a_corrupt_row_of_int8_is_detected(tmp_path):
    write(tmp_path / "staging", tmp_path / "set", storage="int8")
    shard = tmp_path / "set" / "shard-00001.h5"
    with h5py.File(shard, "r+") as h5:
        h5["prompted"][2, 1, 0] += 1
    with pytest.raises(FeatureSetError, match="row 2 is corrupt"):
        FeatureSet(tmp_path / "set").read(np.arange(ROWS))


def test_a_manifest_whose_storage_contradicts_its_version_is_rejected(copied):
    forge(copied, manifest=lambda said: said.update(format_version=2))
    with pytest.raises(FeatureSetError, match="format_version is 2, but its content has version 1"):
        FeatureSet(copied)
