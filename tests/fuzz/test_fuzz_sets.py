"""Manifests, shards and bases of arbitrary content: reading returns what was written, or one error."""

import contextlib
import json
import shutil
import tarfile
from dataclasses import dataclass

import h5py
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline import feature_store
from pipeline.data import datasets
from pipeline.data.datasets import PreparedDataset
from pipeline.diffusion import frozen_model
from pipeline.errors import PipelineError
from pipeline.feature_store import FeatureSet, archive, verification
from pipeline.settings import config
from tests import test_faults_data, test_feature_store
from tests.conftest import invoke, write_params

NAMES = ("manifest.json", "basis.h5", "shard-00000.h5", "shard-00001.h5", "shard-00002.h5")
DATA = ("manifest.json", "train.h5", "test.h5")
ROWS = np.arange(test_feature_store.ROWS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write a set and a data set; return their folder and their contents."""
    root = tmp_path_factory.mktemp("fuzz")
    test_feature_store.write(root / "staging", root / "set")
    for file in (root / "set").iterdir():
        unlinked = file.read_bytes()
        file.unlink()
        file.write_bytes(unlinked)
    test_faults_data.write(root / "data")
    shutil.copytree(root / "set", root / "good")
    (root / "project" / "data" / "features").mkdir(parents=True)
    write_params(root / "project", {})
    return root, everything(root / "set"), pixels(root / "data")


def everything(path):
    """Read everything from a set, as bytes."""
    opened = FeatureSet(path)
    rows, basis = opened.read(ROWS), opened.basis()
    layers = [value for layer in basis.layers.values() for value in vars(layer).values()]
    arrays = [*vars(rows).values(), basis.mean, basis.std, *layers, opened.positive_prompts(rows)]
    return [np.asarray(array).tobytes() for array in arrays]


def pixels(path):
    opened = PreparedDataset(path)
    return [np.asarray(value).tobytes() for split in datasets.SPLITS for value in vars(opened.load(split)).values()]


def same_or_rejected(read, expected):
    """Check that reading returns what was written, or raises an error of one line."""
    try:
        found = read()
    except PipelineError as error:
        assert "\n" not in str(error) and str(error)
        return
    assert found == expected


def commands_answer(root, path, names=("list", "show", "show --json", "show tar", "verify --full", "diff", "export")):
    """Run the `features` commands on the set: each succeeds, or fails with printable lines and no traceback."""
    (root / "project" / "data" / "features" / "one").symlink_to(path)
    arguments = {"list": [], "show tar": [packed(root, path)], "diff": [root / "good", path],
        "export": [path, "-o", root / "out.tar"]}  # fmt: skip
    try:
        for name in names:
            command = [*name.removesuffix(" tar").split(), *map(str, arguments.get(name, [path]))]
            result = invoke(root / "project", "features", *command)
            assert result.exit_code in (0, 1) and (result.exit_code == 0 or "Error: " in result.output), name
            assert all(one.isprintable() for one in result.output.replace("\n", "")), result.output
    finally:
        (root / "project" / "data" / "features" / "one").unlink()


def packed(root, path):
    """Pack the set into a tar, as export would without its checks."""
    with tarfile.open(root / "set.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in NAMES:
            tar.add(path / name, f"set/{name}")
    return root / "set.tar"


def imported_or_rejected(root, path):
    """Check that a rejected import leaves no files."""
    with contextlib.suppress(PipelineError):
        found = archive.read(packed(root, path), root / "imported")
        assert not verification.problems(found, full=True)
        shutil.rmtree(found)
    assert not list((root / "imported").glob("*"))


@contextlib.contextmanager
def replaced(file, content):
    """Give the file other content during the block."""
    good = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.unlink()
        file.write_bytes(good)


def mutate(content, edits):
    """Flip, overwrite, remove or insert bytes; positions are fractions of the file's length."""
    changed = bytearray(content)
    for where, what, piece in edits:
        at = int(where * len(changed))
        if what == "flip" and at < len(changed):
            changed[at] ^= 1 << (piece[0] % 8 if piece else 0)
        elif what == "put":
            changed[at : at + len(piece)] = piece
        elif what == "cut":
            del changed[at:]
        elif what == "insert":
            changed[at:at] = piece
    return bytes(changed)


EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["flip", "put", "cut", "insert"]), st.binary(max_size=16)),
    min_size=1,
    max_size=4,
)


@given(st.sampled_from(NAMES), EDITS)
def test_changed_bytes_in_a_set_are_rejected_or_harmless(written, name, edits):
    root, expected, _ = written
    file = root / "set" / name
    with replaced(file, mutate(file.read_bytes(), edits)):
        same_or_rejected(lambda: everything(root / "set"), expected)


@given(st.sampled_from(NAMES[1:]), EDITS)
@example("shard-00000.h5", [(0.0, "cut", b"")])  # an empty file
def test_changed_bytes_with_matching_checksums_cause_no_crash(written, name, edits):
    """As in a set by a hostile author, or by another program."""
    root, _, _ = written
    file, manifest = root / "set" / name, root / "set" / "manifest.json"
    content = mutate(file.read_bytes(), edits)
    with replaced(file, content), replaced(manifest, vouching(manifest, file)):
        with contextlib.suppress(PipelineError):
            everything(root / "set")
        commands_answer(root, root / "set", ["verify --full", "diff"])


def vouching(manifest, *files):
    """Return the manifest with the actual sizes and checksums of these files."""
    said = json.loads(manifest.read_text())
    by_name = {file.name: file for file in files}
    for entry in [said["basis"], *said["shards"].values()]:
        if file := by_name.get(entry["file"]):
            entry |= {"bytes": file.stat().st_size, "sha256": feature_store.schema.provenance.file_sha256(file)}
    return json.dumps(said).encode()


@given(st.sampled_from(DATA), EDITS)
def test_changed_bytes_in_a_data_set_are_rejected_or_harmless(written, name, edits):
    root, _, expected = written
    file = root / "data" / name
    with replaced(file, mutate(file.read_bytes(), edits)):
        same_or_rejected(lambda: pixels(root / "data"), expected)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.text(max_size=10),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, "all", "label", "first", "../x", "/dev/zero", "shard-00001.h5"]),
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(values, prefix=()):
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*prefix, key)
        if isinstance(value, dict | list):
            yield from places(value, (*prefix, key))


def changed_json(text, changes, fit):
    """Return the JSON with values changed, by their number; `fit` updates the fingerprint to the content."""
    values = json.loads(text)
    for number, value in changes:
        found = list(places(values))
        *parents, key = found[number % len(found)]
        inner = values
        for parent in parents:
            inner = inner[parent]
        if value is ...:
            del inner[key]
        elif isinstance(value, Renamed):
            if isinstance(inner, dict):
                inner[value.key] = inner.pop(key)
        else:
            inner[key] = value
    if fit:
        with contextlib.suppress(Exception):
            values["fingerprint"] = feature_store.schema.provenance.fingerprint(values["content"])
    return json.dumps(values).encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Renamed:
    """A change of a key instead of a value."""

    key: str


KEYS = st.sampled_from(["7", "-1", "99", "0", "01", "x", "", "\x1b[31m\n", "../x", "file", "name"]).map(Renamed)
CHANGES = st.lists(st.tuples(st.integers(0, 200), JSON | KEYS | st.just(...)), min_size=1, max_size=3)


def at(written_text, *path):
    return list(places(json.loads(written_text))).index(path)


@given(CHANGES, st.booleans())
@example([("shards.2", Renamed("7"))], False)  # as many as there should be
@example([("rows", 10**12)], False)  # a number for each of its shards
@example([("rows", 10**30), ("rows_per_shard", 10**30)], False)
@example([("provenance.hardware", [1])], False)
@example([("provenance", {"backbone": "x"})], False)
@example([("provenance", {"packages": {"\x1b[31m\n": "\u202e"}})], False)
@example([("content.positive", "first")], True)
@example([("content.class_names", ["a", "b", "\x1b[31m\n"])], True)
@example([("rows_per_shard", 0)], False)  # divided by it
@example([("content.layers", {})], True)  # the largest of no columns
@example([("content.layers", {"up_blocks.1": [0]})], True)
@example([("content.layers", {"up_blocks.1": [0, 10**18]})], True)  # more memory than there is
@example([("content.layers", {"up_blocks.1": [0, -5]})], True)
@example([("content.prompts", [["a"]] * 100_000)], True)
@example([("content.negatives", -5)], True)
@example([("rows", 2**62)], False)
@example([("rows", 10**400)], False)
def test_changed_manifest_is_rejected_or_harmless(written, changes, fit):
    """`fit`: fingerprint and checksums match, as in a set by another program."""
    root, expected, _ = written
    manifest = root / "set" / "manifest.json"
    text = manifest.read_text()
    changes = [(at(text, *name.split(".")) if isinstance(name, str) else name, value) for name, value in changes]
    changed = changed_json(text, changes, fit)
    if not fit:
        with replaced(manifest, changed):
            same_or_rejected(lambda: everything(root / "set"), expected)
            commands_answer(root, root / "set")
        return
    forged = root / "forged"
    shutil.copytree(root / "set", forged, dirs_exist_ok=True)
    (forged / "manifest.json").write_bytes(changed)
    # The structure may no longer be that of a manifest.
    with contextlib.suppress(TypeError, KeyError, AttributeError, ValueError):
        for file in forged.glob("*.h5"):
            with h5py.File(file, "r+") as h5:
                h5.attrs["fingerprint"] = json.loads(changed)["fingerprint"]
        (forged / "manifest.json").write_bytes(vouching(forged / "manifest.json", *forged.glob("*.h5")))
    with contextlib.suppress(PipelineError):
        everything(forged)
    commands_answer(root, forged)
    imported_or_rejected(root, forged)


@example(changes=[(13, Renamed("\x1b[31m\n"))])  # a key on two lines, and coloured, in the error
@given(CHANGES)
def test_changed_manifest_of_a_data_set_is_rejected_or_harmless(written, changes):
    root, _, expected = written
    manifest = root / "data" / "manifest.json"
    with replaced(manifest, changed_json(manifest.read_text(), changes, fit=False)):
        same_or_rejected(lambda: pixels(root / "data"), expected)


@pytest.mark.parametrize("folder", ["set", "data"])
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000, b'{"a":' * 100_000, b'{"rows": ' + b"9" * 100_000 + b"}", b'{"rows": NaN}', b"\xef\xbb\xbf{}",
        b"\x00" * 10, b'"\\ud800"', b"{}" * 2, b" " * 5_000_000, b'{"format_version": 1e400}',
        b'{"format_version": 1, "format_version": 1}',
    ],
    ids=range(11),
)  # fmt: skip
def test_json_that_is_not_a_manifest_is_rejected(written, folder, content):
    root, _, _ = written
    with replaced(root / folder / "manifest.json", content), pytest.raises(PipelineError) as caught:
        (FeatureSet if folder == "set" else PreparedDataset)(root / folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


def test_duplicate_key_in_a_manifest_is_rejected_or_harmless(written):
    """JSON allows duplicate keys; the fingerprint covers the value that was read."""
    root, expected, _ = written
    manifest = root / "set" / "manifest.json"
    twice = manifest.read_text().replace('"rows_per_shard":', '"rows_per_shard": 3, "rows_per_shard":', 1)
    with replaced(manifest, twice.encode()):
        same_or_rejected(lambda: everything(root / "set"), expected)


FIELDS = ("index", "label", "denoised", "prompted", "prompt_class", "crc32")
DTYPES = st.sampled_from(["<i8", ">i8", "<f2", "<f4", "<f8", "<c8", "u1", "S5", "<i2", "?", "V3"])


def link_to_file(h5, name, root):
    h5[name] = h5py.ExternalLink(str(root / "other.h5"), name)


def virtual(h5, name, root):
    layout = h5py.VirtualLayout((4, 5), "<f2")
    layout[:] = h5py.VirtualSource(str(root / "other.h5"), "denoised", (4, 5))
    h5.create_virtual_dataset(name, layout)


def external(h5, name, root):
    h5.create_dataset(name, (4, 5), "<f2", external=[(str(root / "other.bin"), 0, h5py.h5f.UNLIMITED)])


STRUCTURES = {
    "missing": lambda h5, name, root: None,
    "chunked": lambda h5, name, root: h5.create_dataset(name, data=np.zeros((4, 5), "<f2"), chunks=(2, 5)),
    "compressed": lambda h5, name, root: h5.create_dataset(name, data=np.zeros((4, 5), "<f2"), compression="gzip"),
    "group": lambda h5, name, root: h5.create_group(name),
    "type": lambda h5, name, root: h5.__setitem__(name, np.dtype("<f2")),
    "scalar": lambda h5, name, root: h5.create_dataset(name, data=1.0),
    "null": lambda h5, name, root: h5.create_dataset(name, data=h5py.Empty("<f2")),
    "text": lambda h5, name, root: h5.create_dataset(name, data=["a"] * 4),
    "huge": lambda h5, name, root: h5.create_dataset(name, (2**50, 5), "<f2", chunks=(1024, 5)),
    "huge-contiguous": lambda h5, name, root: h5.create_dataset(name, (2**40, 5), "<f2"),
    "not-allocated": lambda h5, name, root: h5.create_dataset(name, (4, 5), "<f2"),
    "loop": lambda h5, name, root: h5.__setitem__(name, h5py.SoftLink(f"/{name}")),
    "loop-of-groups": lambda h5, name, root: h5.__setitem__(name, h5["/"]),
    "dangling": lambda h5, name, root: h5.__setitem__(name, h5py.SoftLink("/nowhere")),
    "external-link": link_to_file,
    "virtual": virtual,
    "external-data": external,
    "reference": lambda h5, name, root: h5.create_dataset(name, data=h5.ref, dtype=h5py.ref_dtype),
    "variable-length": lambda h5, name, root: h5.create_dataset(name, (4,), h5py.vlen_dtype(np.int32)),
}


def restructure(written, file, name, change):
    """Check reading of the set with one dataset of `file` replaced, and matching checksums."""
    root, expected, _ = written
    path, manifest = root / "set" / file, root / "set" / "manifest.json"
    shutil.copy(root / "set" / "shard-00000.h5", root / "other.h5")
    (root / "other.bin").write_bytes(bytes(1000))
    with replaced(path, path.read_bytes()):
        with h5py.File(path, "r+") as h5:
            if name in h5:
                del h5[name]
            change(h5, name, root)
        with replaced(manifest, vouching(manifest, path)):
            same_or_rejected(lambda: everything(root / "set"), expected)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    "where", ["shard-00000.h5:denoised", "shard-00000.h5:crc32", "basis.h5:mean", "basis.h5:layers"]
)
def test_hdf5_dataset_of_another_structure_is_rejected_or_harmless(written, where, structure):
    restructure(written, *where.split(":"), STRUCTURES[structure])


@given(st.sampled_from(FIELDS), DTYPES, st.lists(st.integers(0, 6), max_size=4))
def test_hdf5_dataset_of_another_type_or_shape_is_rejected_or_harmless(written, name, dtype, shape):
    restructure(
        written, "shard-00000.h5", name, lambda h5, name, root: h5.create_dataset(name, data=np.zeros(shape, dtype))
    )


@given(
    st.sampled_from(["mean", "std", "layers/up_blocks.1/mean", "layers/up_blocks.1/components", "layers/up_blocks.1/x",
                     "layers/up_blocks.1/explained_variance", "layers/up_blocks.1/total_variance"]),
    DTYPES, st.lists(st.integers(0, 6), max_size=3),
)  # fmt: skip
def test_shared_basis_of_another_type_or_shape_is_rejected_or_fits(written, name, dtype, shape):
    """A basis that is shared by path has no manifest: it must fit or be rejected."""
    root, _, _ = written
    file = root / "basis.h5"
    shutil.copy(root / "set" / "basis.h5", file)
    with h5py.File(file, "r+") as h5:
        if name in h5:
            del h5[name]
        h5.create_dataset(name, data=np.zeros(shape, dtype))
    with contextlib.suppress(PipelineError):
        basis = feature_store.read_basis_file(file, ["up_blocks.1"])
        assert basis.mean.dtype == basis.std.dtype == np.float64 and basis.mean.ndim == basis.std.ndim == 1


@given(EDITS)
def test_changed_bytes_in_a_shared_basis_cause_no_crash(written, edits):
    root, _, _ = written
    file = root / "shared.h5"
    file.write_bytes(mutate((root / "set" / "basis.h5").read_bytes(), edits))
    with contextlib.suppress(PipelineError):
        feature_store.read_basis_file(file, ["up_blocks.1"])


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The configuration of a project with an empty model."""
    root = tmp_path_factory.mktemp("model-manifest")
    write_params(root, {})
    loaded = config.load(root / "params.yaml")
    loaded.backbone_dir.mkdir(parents=True)
    loaded.backbone_manifest.parent.mkdir(parents=True)
    return loaded


@given(CHANGES | st.just([]), st.binary(max_size=20))
@example([], b"[" * 100_000)
@example([("files", {"/dev/zero": "0" * 64})], b"")
@example([("files", {"a\x00b": "0" * 64})], b"")
@example([("files", {"x" * 5000: "0" * 64})], b"")
@example([("files", {".": "0" * 64})], b"")
def test_changed_manifest_of_a_frozen_model_causes_no_crash(settings, changes, content):
    text = json.dumps({"name": "x", "source": "y", "revision": None, "files": {"unet/a.safetensors": "0" * 64}})
    changes = [(at(text, *name.split(".")) if isinstance(name, str) else name, value) for name, value in changes]
    settings.backbone_manifest.write_bytes(changed_json(text, changes, fit=False) if changes else content)
    with contextlib.suppress(PipelineError):
        found = frozen_model.read_checked(settings.backbone_manifest, settings.backbone_dir)
        assert found.files == {}  # no file of that hash is there
