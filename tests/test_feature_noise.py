"""`pipeline features export --noise`: what is added, to what, and what reads it."""

import json
import logging
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ConfigError, FeatureSetError, PipelineError
from pipeline.feature_store import (
    Basis,
    Features,
    FeatureSet,
    FeatureSetWriter,
    LayerBasis,
    Noise,
    Plan,
    archive,
    noise,
    reader,
    verification,
)
from stages.extract_features import publish
from stages.train_fl import run
from tests.test_feature_store import D, P, content, write
from tests.test_features_cli import project_with_one_set
from tests.test_features_cli import run as command
from tests.train_fl import tiny_project

STD = np.array([0.5, 1.0, 2.0, 4.0, 0.0])
MANY, PER_SHARD = 3000, 1000


def write_many(root, value=0.0, std=STD, **changes):
    """Write a set of 3,000 rows in three shards whose numbers all have one value; its basis has this deviation."""
    plan = Plan(content(**changes), MANY, PER_SHARD, {"dataset": "made up"})
    writer = FeatureSetWriter(root / "staging", plan, "a processor")
    layer = LayerBasis(np.zeros(D), np.eye(D), np.ones(D), float(D))
    writer.write_basis(Basis({"up_blocks.1": layer}, np.zeros(D), std))
    for shard in range(plan.num_shards):
        index = np.array(plan.shard_rows(shard))
        same = [np.full((len(index), *shape), value, np.float16) for shape in ((D,), (P, D))]
        classes = np.tile(np.arange(P, dtype=np.int16), (len(index), 1))
        writer.write_shard(shard, Features(index, index % 3, *same, classes), redone_in_float32=shard)
    writer.publish(root / "sets" / "mine")
    return root / "sets" / "mine"


def shared(path, scale, root, name="received"):
    """Export with noise and import; return the received set."""
    archive.write(path, root / f"{name}.tar", noise_scale=scale)
    return FeatureSet(archive.read(root / f"{name}.tar", root / "received", name))


def numbers(features):
    """Return all representations of a set, float64 (N, 1 + P, D)."""
    rows = features.read(np.arange(len(features)))
    return np.concatenate([rows.denoised[:, None], rows.prompted], 1).astype(np.float64)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def correlation(one, other):
    return abs(np.corrcoef(one.ravel(), other.ravel())[0, 1])


@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_every_number_gets_independent_noise_of_its_dimension(tmp_path, scale):
    path = write_many(tmp_path, value=1.0)
    added = numbers(shared(path, scale, tmp_path)) - 1  # (N, 1 + P, D)
    assert added.shape == (MANY, 1 + P, D)
    wanted = scale * STD
    # 3,000 draws: the standard error of a deviation is 1.3 % of it, that of a mean 1.8 %; six of them
    assert np.abs(added.std(0) - wanted).max(0) == pytest.approx(0, abs=0.08 * wanted.max())
    assert (np.abs(added.std(0) - wanted) <= 0.08 * wanted).all() and (np.abs(added.mean(0)) <= 0.11 * wanted).all()
    units = added[..., :4] / wanted[:4]
    share = (np.abs(units) < 1).mean(), (np.abs(units) < 2).mean()
    assert share == (pytest.approx(0.6827, abs=0.012), pytest.approx(0.9545, abs=0.006))  # of a normal distribution
    # rows, shards, prompts and dimensions have noise of their own
    assert correlation(units[:-1], units[1:]) < 0.03
    assert correlation(units[:PER_SHARD], units[PER_SHARD : 2 * PER_SHARD]) < 0.06
    assert correlation(units[:, 0], units[:, 1]) < 0.06 and correlation(units[..., 0], units[..., 1]) < 0.06


def test_a_copy_is_a_set_of_its_own_and_its_source_is_unchanged(tmp_path):
    path = write_many(tmp_path)
    before, source = contents(path), FeatureSet(path)
    found = shared(path, 4.0, tmp_path)
    assert contents(path) == before
    assert verification.problems(found.path, full=True) == []
    ours, theirs = found.manifest, source.manifest
    assert ours.content.added_noise.scale == 4 and ours.fingerprint != theirs.fingerprint
    assert "; noise of 4 standard deviations; fingerprint" in repr(found) and "noise" not in repr(source)
    # besides the noise, it is as it was
    assert ours.content.model_copy(update={"added_noise": None}).fingerprint == theirs.fingerprint
    assert (ours.provenance, ours.plan.rows_per_shard) == (theirs.provenance, PER_SHARD)
    assert [entry.redone_in_float32 for entry in ours.files] == [entry.redone_in_float32 for entry in theirs.files]
    rows, originals = (one.read(np.arange(MANY)) for one in (found, source))
    for field in ("index", "label", "prompt_class"):
        assert np.array_equal(getattr(rows, field), getattr(originals, field))
    assert np.array_equal(found.basis().std, STD)


def test_two_exports_differ_and_their_mean_has_less_noise(tmp_path):
    path = write_many(tmp_path)
    one, other = (shared(path, 4.0, tmp_path, name) for name in ("one", "other"))
    assert one.manifest.fingerprint != other.manifest.fingerprint
    first, second = numbers(one)[..., :4], numbers(other)[..., :4]
    assert correlation(first, second) < 0.03
    assert ((first + second) / 2).std() == pytest.approx(first.std() / np.sqrt(2), rel=0.03)


def test_copy_of_int8_stores_float16_whose_range_has_all_of_the_noise(tmp_path):
    path = write_many(tmp_path, storage="int8")
    found = shared(path, 8.0, tmp_path)
    assert found.manifest.content.storage == "float16" and found.manifest.format_version == 3
    assert verification.problems(found.path, full=True) == []
    units = numbers(found)[..., :4] / STD[:4]
    assert units.std() == pytest.approx(8, rel=0.03) and np.abs(units).max() > 24


def test_noise_beyond_float16_stays_finite(tmp_path):
    path = write_many(tmp_path, value=60_000.0, std=np.full(D, 1e4))
    found = shared(path, 100.0, tmp_path)
    values = numbers(found)
    assert np.abs(values).max() == 65504 and (np.abs(values) == 65504).mean() > 0.5
    assert verification.problems(found.path, full=True) == []


def test_sets_without_noise_keep_their_bytes_and_version(tmp_path):
    """The fingerprints that versions 1 and 2 gave to these sets."""
    plain, small = content(), content(storage="int8")
    assert plain.fingerprint == "37fdd3697e959bcd8fe76e749ac045e7c0f6d4c4513d7d4d586cf2e5df81fa0e"
    assert small.fingerprint == "9037f3b05a1932fe272fc4d07172e4232a981f8c9121477a82a91a12f1910e1f"
    assert (plain.format_version, small.format_version) == (1, 2)
    assert "added_noise" not in plain.model_dump() and "added_noise" not in plain.common()
    noisy = [content(added_noise=Noise(scale=4.0, draw=digit * 32)) for digit in "01"]
    assert noisy[0].format_version == noisy[1].format_version == 3
    assert noisy[0].fingerprint != noisy[1].fingerprint and noisy[0].common() == noisy[1].common() != plain.common()


def test_programs_that_read_earlier_versions_refuse_a_copy_in_one_line(tmp_path, monkeypatch):
    found = shared(write_many(tmp_path), 1.0, tmp_path)
    monkeypatch.setattr(reader, "FORMAT_VERSIONS", (1, 2))
    with pytest.raises(FeatureSetError, match=r"has format version 3, but this program reads 1 and 2. Update the prog"):
        FeatureSet(found.path)


def test_manifest_that_contradicts_its_noise_is_rejected(tmp_path):
    found = shared(write_many(tmp_path), 1.0, tmp_path)
    file = found.path / "manifest.json"
    said = json.loads(file.read_text())
    for change, match in (
        ({"format_version": 1}, "format_version is 1, but its content has version 3"),
        ({"content": said["content"] | {"added_noise": {"scale": 0.0, "draw": "0" * 32}}}, "added_noise.scale"),
        ({"content": said["content"] | {"added_noise": {"scale": 1.0, "draw": "seed 0"}}}, "added_noise.draw"),
        ({"content": said["content"] | {"added_noise": {"scale": 2.0, "draw": "0" * 32}}}, "was changed"),
    ):
        file.write_text(json.dumps(said | change))
        with pytest.raises(FeatureSetError, match=match):
            FeatureSet(found.path)


# Errors


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 100.5, 1e-3])
def test_a_scale_out_of_range_is_rejected(tmp_path, scale):
    write(tmp_path / "staging", tmp_path / "mine")
    before = set(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"is not a valid scale of noise. Choose from 0.01 to 100 standard"):
        archive.write(tmp_path / "mine", tmp_path / "mine.tar", noise_scale=scale)
    assert set(tmp_path.iterdir()) == before


def test_a_set_with_noise_gets_no_more_noise_but_is_exported_as_it_is(tmp_path):
    found = shared(write_many(tmp_path), 1.0, tmp_path, "mine")
    with pytest.raises(FeatureSetError, match=r"has noise of 1 standard deviation already. Export it as it is, or add"):
        archive.write(found.path, tmp_path / "again.tar", noise_scale=1.0)
    assert not list(tmp_path.glob("again*"))
    archive.write(found.path, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "mine.tar").read_bytes()


def test_an_existing_copy_is_kept(tmp_path):
    path = write_many(tmp_path)
    (tmp_path / ".noisy.tar.unfinished").mkdir()  # of an export that was killed
    (tmp_path / ".noisy.tar.unfinished" / "basis.h5").touch()
    archive.write(path, tmp_path / "noisy.tar", noise_scale=1.0)
    before = contents(tmp_path)
    assert ".noisy.tar.unfinished" not in [file.name for file in tmp_path.iterdir()]
    with pytest.raises(PipelineError, match=r"noisy.tar exists already, .*Give everyone that tar, or choose"):
        archive.write(path, tmp_path / "noisy.tar", noise_scale=1.0)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("noise_scale", [None, 1.0])
def test_only_a_file_is_replaced(tmp_path, noise_scale, monkeypatch):
    path = write_many(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    for name, kind in (("folder", "a folder"), (".", "a folder"), ("/", "a folder"), ("pipe", "not a regular file")):
        with pytest.raises(PipelineError, match=rf"{re.escape(name)} is {kind}\. Give the path of a tar with -o"):
            archive.write(path, Path(name), noise_scale=noise_scale)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, None])
def test_nothing_is_left_after_an_error(tmp_path, error):
    path, out, seen = write_many(tmp_path), tmp_path / "out", []
    out.mkdir()

    def stop(size):
        seen.append(len(list(out.glob(".noisy.tar.*/*/*.h5"))))
        if error and len(seen) == 2:
            raise error

    if not error:
        shard = path / "shard-00002.h5"
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1  # behind the rows
        shard.unlink()
        shard.write_bytes(data)
    with pytest.raises(error or FeatureSetError, match=None if error else "shard-00002.h5 is corrupt .SHA-256 differs"):
        archive.write(path, out / "noisy.tar", stop, noise_scale=4.0)
    assert seen == [2, 3]  # the copy was beside the archive: its basis and the shards so far
    assert list(out.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    path = write_many(tmp_path)
    with pytest.raises(PipelineError, match="nowhere/x.tar cannot be written .*Choose another path with -o"):
        archive.write(path, tmp_path / "nowhere" / "x.tar", noise_scale=4.0)


def test_shards_are_copied_one_by_one(tmp_path, monkeypatch):
    path, most = write_many(tmp_path), []
    read = FeatureSet.read
    monkeypatch.setattr(FeatureSet, "read", lambda self, index: most.append(len(index)) or read(self, index))
    advanced = []
    (tmp_path / "folder").mkdir()
    noise.write_copy(FeatureSet(path), 1.0, tmp_path / "folder", advanced.append)
    assert most == [PER_SHARD] * 3 and sum(advanced) == verification.total_bytes(path)


# The commands


@pytest.fixture
def root(tmp_path):
    return project_with_one_set(tmp_path)


def test_commands_name_the_noise(root):
    tar = str(root / "noisy.tar")
    assert command(root, "export", "one", "--noise", "4", "-o", tar).strip() == tar
    with tarfile.open(tar) as members:
        assert members.getnames() == [f"one/{name}" for name in ("manifest.json", "basis.h5", *SHARDS)]
    assert "holds another feature set" in command(root, "import", tar, code=1)
    command(root, "import", tar, "--as", "noisy")
    assert "noisy: intact, every byte was checked" in command(root, "verify", "--full")
    listed = command(root, "list")
    assert "3 prompts; float16, noise 4, " in listed and listed.count("noise") == 1
    assert [one["added_noise"] for one in json.loads(command(root, "list", "--json"))] == [4.0, None]
    for where in ("noisy", tar):
        assert "noise of 4 standard deviations, added to every number by an export" in command(root, "show", where)
    assert "standard deviations" not in command(root, "show", "one")
    output = command(root, "diff", "one", "noisy")
    assert "different features" in output and "content.added_noise.scale: null | 4.0" in output
    assert "denoised, up_blocks.1: 100.00 % of the numbers differ" in output
    help_text = " ".join(command(root, "export", "--help").split())
    assert "two exports differ" in help_text and "average the noise away" in help_text


SHARDS = [f"shard-0000{number}.h5" for number in range(3)]


@pytest.mark.parametrize("scale", ["0", "-4", "nan", "inf", "101"])
def test_a_wrong_scale_is_one_line(root, scale):
    output = command(root, "export", "one", f"--noise={scale}", "-o", str(root / "x.tar"), code=1)
    assert output.startswith("Error: ") and output.count("\n") == 1 and "Choose from" in output
    assert not list(root.glob("x.tar*"))


# Extraction and training


def test_extraction_does_not_take_a_copy_for_its_own_set(tmp_path):
    writer = write(tmp_path / "staging", tmp_path / "sets" / "mine")
    found = shared(tmp_path / "sets" / "mine", 4.0, tmp_path)
    before = contents(found.path)
    assert not publish.is_complete(found.path, writer.plan)
    with pytest.raises(
        FeatureSetError, match=r"holds a finished feature set of other settings or data \(added_noise\)\. .*--overwrite"
    ):
        publish.publish(writer, found.path, lambda shards: None, overwrite=False)
    assert contents(found.path) == before
    publish.publish(writer, found.path, lambda shards: None, overwrite=True)
    assert FeatureSet(found.path).manifest.content.added_noise is None


def test_training_from_a_copy_says_so(tmp_path, caplog):
    project = tiny_project.make(tmp_path, train_fl__num_rounds=1, runtime__workers=1)
    tiny_project.add_features(project)
    without = json.loads((run(project, "feddifrc", "iid", 0) / "config.json").read_text())
    tar = tmp_path / "noisy.tar"
    archive.write(project.features_dir, tar, noise_scale=4.0)
    shutil.rmtree(project.features_dir)
    archive.read(tar, project.features_dir.parent)
    caplog.set_level(logging.INFO)
    with pytest.raises(ConfigError, match="features"):  # the finished run is of other features
        run(project, "feddifrc", "iid", 0)
    caplog.clear()
    path = run(project, "feddifrc", "iid", 0, overwrite=True)
    lines = [record.getMessage() for record in caplog.records if "noise" in record.getMessage()]
    assert lines == [f"{project.features_dir} has noise of 4 standard deviations"]
    made = json.loads((path / "config.json").read_text())
    assert made["feature_noise"] == 4 and "feature_noise" not in without
    assert made["features"] == FeatureSet(project.features_dir).manifest.fingerprint != without["features"]
    before = os.stat(path / "metrics.json").st_mtime_ns
    run(project, "feddifrc", "iid", 0)  # the same copy: complete already
    assert os.stat(path / "metrics.json").st_mtime_ns == before
