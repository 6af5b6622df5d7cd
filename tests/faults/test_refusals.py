"""A file that the operating system refuses to read is not reported as damaged, missing or unfinished, and not lost."""

import contextlib
import errno
import fcntl
import functools
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from pipeline import provenance
from pipeline.data import datasets
from pipeline.data.datasets import Images, PreparedDataset, Source
from pipeline.errors import PipelineError
from pipeline.feature_store import (
    FeatureSet,
    archive,
    comparison,
    listing,
    read_basis_file,
    read_manifest,
    verification,
)
from pipeline.io import atomic, locks
from pipeline.io.hdf5 import open_to_read
from pipeline.io.resumable import ResumableStore
from pipeline.io.system_errors import SystemRefusal, status
from pipeline.settings import config, presets
from stages.analyze_features.sweep.cache import SweepCache, SweepResult
from stages.extract_features import publish
from stages.extract_features.latents import LatentCache
from stages.prepare_data import sources
from stages.report import analysis
from stages.train_fl import records
from stages.train_fl.checkpoint import Checkpoint
from stages.train_fl.client_states import ClientStates
from stages.train_fl.methods import ServerState
from stages.train_fl.rounds import Progress
from tests import test_feature_store as store
from tests.conftest import REPOSITORY, write_params
from tests.faults import program
from tests.faults.kernel import CAN_REFUSE, in_child, refuse
from tests.faults.program import EXTRACT, RUN, SET, SWEEP, TRAIN
from tests.faults.test_damage import without_locks
from tests.prepare_data import large_files
from tests.test_feature_store import ROWS, open_writer, write

NOBODY = 65534


def usually(names, always):
    """Return all names; only `make test-faults` tries those that are not in `always`."""
    return [name if name in always else pytest.param(name, marks=pytest.mark.faults) for name in names]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with one file of every kind that is read again."""
    root = tmp_path_factory.mktemp("kept")
    writer = write(root / "staging", root / "sets" / "set")
    archive.write(root / "sets" / "set", root / "set.tar")
    shutil.copytree(root / "sets" / "set", root / "elsewhere" / "set")
    rng = np.random.default_rng(0)
    images = Images.of_one_domain(rng.integers(0, 255, (4, 4, 4, 3)).astype(np.uint8), np.arange(4) % 2)
    datasets.write(root / "data", "data", "test", Source(["a", "b"], {"train": images, "test": images}, "none"))
    state = {"w": torch.ones(2)}
    checkpoint = _checkpoint(root)
    checkpoint.states.save(0, 1, state)
    checkpoint.save(Progress(1, ServerState(state), {0: 1}), {"rounds": [], "timing": []})
    ResumableStore(root / "classes").save("class-00000", {"images": torch.zeros(2, 4, 4, 3, dtype=torch.uint8)})
    LatentCache(root / "latents").save(0, torch.ones(2, 1, 4, 4))
    atomic.write_json(root / "config.json", {"seed": 0})
    SweepCache(root / "sweep").save(100, SweepResult([], [], {}))
    (root / "presets").mkdir()
    (root / "presets" / "one.yaml").write_text("# One.\n")
    table = large_files.table([large_files.png(1)] * 2, [0, 1])
    large_files.write_tar(root / "tars" / "train.tar", large_files.samples([0, 1]))
    large_files.write_parquet(root / "tables" / "train.parquet", table)
    large_files.write_arrow(root / "saved", table)
    write_params(root, {"prepare_data.image_size": 8})
    assert writer.missing_shards == []
    return root


def images_of(root, source, folder):
    """List and read the images of a source of large files."""
    splits = sources.SOURCES[source](root / folder, params_of(root)).splits.values()
    return sum(len(block.rows) for split in splits for block in split.blocks())


@functools.cache
def params_of(root):
    return config.load(root / "params.yaml").params.prepare_data


def _checkpoint(root):
    return Checkpoint(root / "checkpoint", ClientStates(root / "checkpoint" / "states"))


def plan_of(root):
    return read_manifest(root / "sets" / "set").plan


@functools.cache
def opened_writer(root):
    return open_writer(root / "staging")


READERS = {
    "images": lambda root: len(PreparedDataset(root / "data").load("train").images),
    "data set's manifest": lambda root: PreparedDataset(root / "data").name,
    "set's manifest": lambda root: read_manifest(root / "sets" / "set").rows,
    "basis": lambda root: len(FeatureSet(root / "sets" / "set").basis().mean),
    "given basis": lambda root: len(read_basis_file(root / "sets" / "set" / "basis.h5", ["up_blocks.1"]).mean),
    "rows": lambda root: FeatureSet(root / "sets" / "set").read(np.arange(ROWS)).index.tolist(),
    "staged shards": lambda root: opened_writer(root).missing_shards,
    "every byte of staged shards": lambda root: opened_writer(root).forget_damaged(range(3)),
    "archive": lambda root: archive.manifest_of(root / "set.tar").rows,
    "finished set": lambda root: publish.is_complete(root / "sets" / "set", plan_of(root)),
    "set to replace": lambda root: publish.check_replaceable(root / "sets" / "set", plan_of(root)),
    "checkpoint": lambda root: _checkpoint(root).load("cpu")[0].number,
    "client's state": lambda root: _checkpoint(root).states.load(0, 1)["w"].tolist(),
    "run to replace": lambda root: records.check_replaceable(root, {"seed": 0}),
    "timestep of a sweep": lambda root: len(SweepCache(root / "sweep").load(100).candidates),
    "generated class": lambda root: len(ResumableStore(root / "classes").load("class-00000")[0]["images"]),
    "analysis": lambda root: analysis._text_at(root / "config.json", "seed"),
    "picture": lambda root: len(analysis._content(root / "config.json")),
    "tar": lambda root: images_of(root, "webdataset", "tars"),
    "Parquet": lambda root: images_of(root, "parquet", "tables"),
    "Arrow": lambda root: images_of(root, "hf-dataset", "saved"),
    "checksum": lambda root: provenance.file_sha256(root / "config.json"),
}
OF_SAFETENSORS = {"checkpoint", "client's state", "generated class", "timestep of a sweep"}
OF_HDF5 = {"images", "basis", "given basis", "rows", "every byte of staged shards", "finished set"}
BY_LOOKING = {"basis", "rows", "staged shards", "every byte of staged shards", "finished set", "set's manifest"}
REFUSED = [
    *(("openat", code, READERS) for code in (errno.EACCES, errno.EMFILE, errno.ESTALE, errno.EIO)),
    *(("flock", code, OF_HDF5) for code in (errno.EAGAIN, errno.EDEADLK)),
    ("pread64", errno.EIO, {"given basis", "images"}),
    ("read", errno.EIO, set(READERS) - {"images", "given basis", *OF_SAFETENSORS}),
    ("newfstatat", errno.ESTALE, BY_LOOKING),
    ("newfstatat", errno.EACCES, BY_LOOKING),
]


def after(call, code, action, root):
    """Run `action` once, so that all else is open already, and return its result while the kernel refuses the call."""
    action(root)
    refuse(call, code)
    return action(root)


@CAN_REFUSE
@pytest.mark.parametrize("reader", READERS)
def test_refused_read_is_reported_as_such_and_loses_nothing(kept, reader, trial):
    before, intact = program.contents(kept), READERS[reader](kept)
    for call, code, readers in REFUSED:
        if reader not in readers:
            continue
        with trial("refusal of the system") as tried:
            kind, said = in_child(lambda c=call, n=code: after(c, n, READERS[reader], kept))
            assert issubclass(kind, SystemRefusal), (call, code, kind, said)
            assert os.strerror(code) in said and str(kept) in said and "\n" not in said
            assert "delete" not in said and "corrupt" not in said and "missing" not in said
            tried.compare(before, program.contents(kept))
    assert READERS[reader](kept) == intact


@CAN_REFUSE
def test_refused_reads_are_merged_by_verify_and_not_called_broken_by_list(kept):
    def verified(root):
        return [(type(error), str(error)) for error in verification.problems(root / "sets" / "set", full=True)]

    ((kind, said),) = in_child(lambda: after("flock", errno.EAGAIN, verified, kept))
    assert issubclass(kind, SystemRefusal)  # the basis and three shards
    assert "basis.h5 and 3 more cannot be read (Resource temporarily unavailable)" in said

    def listed(root):
        return [one.state for one in listing.finished(root / "sets")]

    assert listed(kept) == ["complete"]
    (state,) = in_child(lambda: after("openat", errno.EMFILE, lambda root: [read_state(root)], kept))
    assert "manifest.json cannot be read (Too many open files)" in state and "broken" not in state


def read_state(root):
    return listing._summarise(root / "sets" / "set").state


@CAN_REFUSE
def test_unreadable_folder_does_not_count_as_empty(kept):
    for action in (lambda root: listing.finished(root / "sets"), lambda root: presets.describe(root / "presets")):
        kind, said = in_child(lambda a=action: after("openat", errno.EACCES, a, kept))
        assert issubclass(kind, SystemRefusal) and "cannot be read (Permission denied)" in said


@CAN_REFUSE
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_finished_files_are_read_on_a_file_system_without_locks(kept, code):
    for reader in OF_HDF5 - {"every byte of staged shards"}:
        assert in_child(lambda r=reader: after("flock", code, READERS[r], kept)) == READERS[reader](kept)
    assert (
        in_child(lambda: after("flock", code, lambda root: verification.problems(root / "sets/set", True), kept)) == []
    )


@CAN_REFUSE
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EINVAL])
def test_refused_lock_that_the_environment_demands_is_not_called_damage(kept, code):
    """HDF5 reads the variable when it is loaded, so this needs a new interpreter."""
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from pipeline.io.hdf5 import open_to_read\nfrom tests.faults import kernel\n"
        "kernel.refuse('flock', int(sys.argv[2]))\n"
        "try:\n    open_to_read(Path(sys.argv[1])).__enter__()\nexcept Exception as error:\n    print(repr(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, kept / "data" / "train.h5", str(code)],
        env=os.environ | {"HDF5_USE_FILE_LOCKING": "TRUE"}, cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("SystemRefusal(") and "HDF5_USE_FILE_LOCKING=FALSE" in done.stdout


@CAN_REFUSE
def test_damage_is_found_on_a_file_system_without_locks(kept, tmp_path):
    folder = shutil.copytree(kept / "sets" / "set", tmp_path / "set")
    content = bytearray((folder / "shard-00001.h5").read_bytes())
    content[-1] ^= 1
    (folder / "shard-00001.h5").write_bytes(content)
    (folder / "basis.h5").write_bytes(content)

    def faults(root):
        return [str(error) for error in verification.problems(folder, full=True)]

    basis, *of_shard = in_child(lambda: after("flock", errno.ENOLCK, faults, tmp_path))
    assert "basis.h5 has" in basis and "shard-00001.h5 is corrupt (SHA-256 differs" in of_shard[0]


@CAN_REFUSE
def test_writers_report_a_file_system_without_locks(tmp_path):
    def hold(root):
        with locks.held(root / "lock", "x"):
            pass

    def fill(root):
        with atomic.replace_folder(root / "folder"):
            pass

    for action in (hold, fill):
        kind, said = in_child(lambda a=action: after("flock", errno.ENOLCK, a, tmp_path))
        assert kind is PipelineError and "cannot be locked (No locks available). File locks keep two" in said


@CAN_REFUSE
def test_unreadable_latents_are_recomputed_and_kept(kept, caplog):
    cache, before = LatentCache(kept / "latents"), program.contents(kept)

    def load(root):
        found = cache.load(0)
        return found is None, [record.getMessage() for record in caplog.records]

    nothing, (said,) = in_child(lambda: after("openat", errno.EMFILE, load, kept))
    assert nothing and "cannot be read (Too many open files)" in said and said.endswith("Encoding its images again.")
    assert program.contents(kept) == before and cache.load(0).shape == (2, 1, 4, 4)


def test_file_in_a_forbidden_folder_does_not_count_as_missing():
    """The file is looked up by another user, who has no permission for its folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "closed"
        folder.mkdir()
        (folder / "file").touch()
        for path in (Path(name), folder):
            path.chmod(0o755 if path.name != "closed" else 0o700)

        def look(path):
            if os.geteuid() == 0:
                os.setuid(NOBODY)
            else:
                folder.chmod(0)
            return status(path)

        kind, said = in_child(lambda: look(folder / "file"))
        assert issubclass(kind, SystemRefusal) and f"{folder / 'file'} cannot be read (Permission denied)" in said
        folder.chmod(0o700)
        assert status(folder / "nothing") is None and status(folder / "file" / "below") is None


@contextlib.contextmanager
def held(file):
    """Let another process have the file open for writing, as a notebook does."""
    code = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b"open\n"
        yield
        holder.stdin.close()


VERIFY = ("features", "verify")
IMAGES, SHARD, BASIS = "data/datasets/digits/train.h5", f"{SET}/shard-00001.h5", f"{SET}/basis.h5"
HELD = {
    "train on images": (IMAGES, TRAIN),
    "train on shard": (SHARD, TRAIN),
    "train on basis": (BASIS, TRAIN),
    "verify shard": (SHARD, VERIFY),
    "verify basis": (BASIS, (*VERIFY, "--full")),
    "verify bytes": (SHARD, (*VERIFY, "--full")),
    "export": (SHARD, ("features", "export", SET.name)),
    "diff": (SHARD, ("features", "diff", SET.name, SET.name)),
    "extract": (SHARD, EXTRACT),
    "analyze": (SHARD, ("analyze-features",)),
    "synthetic images": ("data/datasets/digits-synthetic/train.h5", (*TRAIN, "--balance-with-synthetic", "mean",
        "--method", "fedavg")),
}  # fmt: skip


@pytest.mark.parametrize("name", usually(HELD, ("train on shard", "verify bytes", "extract")))
def test_file_open_for_writing_elsewhere_is_reported_and_unchanged(project, trial, name):
    file, command = HELD[name]
    if command == TRAIN:
        program.unfinish_run(project)
    with trial("file open for writing elsewhere") as tried:
        before = program.contents(project)
        with held(project / file):
            line = program.refuse(project, *command, says=[file, "Resource temporarily unavailable", "Another process"])
        assert "delete" not in line and "corrupt" not in line
        tried.compare(before, without_locks(program.contents(project), before))
        program.succeed(project, *command)
        after_it = program.contents(project)
        tried.compare({n: before[n] for n in before if n.startswith("data/")},
                      {n: after_it[n] for n in after_it if n.startswith("data/")})  # fmt: skip


def test_file_being_written_is_not_called_damaged_even_without_locks(kept, tmp_path, monkeypatch):
    """HDF5_USE_FILE_LOCKING=FALSE lets a file be read while it is written; a difference is then no sign of damage."""
    folder = shutil.copytree(kept / "sets/set", tmp_path / "set")
    data = shutil.copytree(kept / "data", tmp_path / "data")
    intact = {file: file.read_bytes() for file in (folder / "shard-00001.h5", data / "train.h5")}
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "FALSE")
    for file, content in intact.items():
        with open(file, "r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # as HDF5 does for a writer that uses locks
            stream.seek(-1, os.SEEK_END)
            stream.write(bytes([content[-1] ^ 1]))
            stream.flush()
            with pytest.raises(SystemRefusal, match=f"{file.name} cannot be read"):
                FeatureSet(folder).verify_files() if file.parent == folder else PreparedDataset(data).load("train")
        with pytest.raises(PipelineError, match=f"{file.name} (is corrupt|does not hold)"):  # now it is known
            FeatureSet(folder).verify_files() if file.parent == folder else PreparedDataset(data).load("train")


def test_row_being_written_during_training_is_not_called_damaged(kept, tmp_path):
    folder = shutil.copytree(kept / "sets" / "set", tmp_path / "set")
    features, file = FeatureSet(folder), folder / "shard-00001.h5"
    features.read(np.arange(ROWS))  # the maps are open from now on
    with h5py.File(file, "r") as h5:
        offset = h5["denoised"].id.get_offset()
    with open(file, "r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        before = os.pread(stream.fileno(), 1, offset)
        os.pwrite(stream.fileno(), bytes([before[0] ^ 1]), offset)
        with pytest.raises(SystemRefusal, match="shard-00001.h5 cannot be read"):
            features.read(np.arange(ROWS))
    with pytest.raises(PipelineError, match="shard-00001.h5: row 0 is corrupt"):
        features.read(np.arange(ROWS))


def test_set_that_a_killed_process_had_open_is_intact(kept, tmp_path, caplog):
    folder = shutil.copytree(kept / "sets" / "set", tmp_path / "set")
    code = "import h5py, os, sys; f = h5py.File(sys.argv[1], 'r+'); os._exit(0)"
    for name in ("basis.h5", "shard-00001.h5"):
        before = (folder / name).read_bytes()
        subprocess.run([sys.executable, "-c", code, folder / name], check=True)
        after = (folder / name).read_bytes()
        assert [place for place in range(len(before)) if before[place] != after[place]] == [20]  # the consistency flags
    FeatureSet(folder).verify_files()
    FeatureSet(folder).read(np.arange(ROWS))
    assert FeatureSet(folder).basis() is not None
    assert verification.problems(folder, full=True) == []
    assert "shard-00001.h5 was open for writing when a process was killed; its data are intact" in caplog.text
    with open(folder / "shard-00001.h5", "r+b") as stream:
        stream.seek(24)
        stream.write(b"\xff")
    assert any("shard-00001.h5" in str(fault) for fault in verification.problems(folder, full=True))


def test_mark_of_a_killed_writer_is_not_called_damage(tmp_path):
    """HDF5's newer format marks in the file that it is open for writing."""
    file = tmp_path / "marked.h5"
    h5py.File(file, "w", libver="latest").close()
    code = "import h5py, os, sys; f = h5py.File(sys.argv[1], 'r+', libver='latest'); os._exit(0)"
    subprocess.run([sys.executable, "-c", code, file], check=True)
    with pytest.raises(SystemRefusal, match="it is marked as open for writing.*killed while it wrote.*h5clear -s"):
        with open_to_read(file):
            pass


MANY = 200


def use(folder):
    """Read, verify, compare, export and import a set, and return the descriptors left open by it and what was found."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    features, order = FeatureSet(folder, partial=True), np.random.default_rng(0).permutation(MANY)
    before = len(os.listdir("/dev/fd"))
    batches = [features.read(order[start : start + 100]).index for start in range(0, MANY, 100)]  # as training does
    opened = len(os.listdir("/dev/fd")) - before
    problems = [verification.problems(folder, full) for full in (False, True)]
    gaps = [gap.largest for gap in comparison.numbers(folder, folder)]
    archive.write(folder, folder.with_suffix(".tar"))
    copy = archive.read(folder.with_suffix(".tar"), folder.parent, "copy")
    in_order = np.array_equal(np.concatenate(batches), order)
    return opened, in_order, problems, gaps, [one.state for one in listing.finished(folder.parent) if one.bytes], copy


def test_any_number_of_shards_needs_few_file_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROWS", MANY)
    monkeypatch.setattr(store, "PER_SHARD", 1)
    writer = store.write(tmp_path / "staging", shards=[])
    for shard in range(MANY):
        writer.write_shard(shard, store.features(range(shard, shard + 1)), 0)
    writer.publish(tmp_path / "sets" / "set")
    found = in_child(lambda: use(tmp_path / "sets" / "set"))
    assert found == (0, True, [[], []], [0, 0], ["complete"] * 2, tmp_path / "sets" / "copy")


def test_staged_shard_open_elsewhere_is_not_recomputed(made, project, trial):
    shutil.rmtree(project / SET)  # as if the extraction had been killed before its end
    (staged,) = (project / ".pipeline" / "staging").glob("*/shard-00001.h5")
    with trial("file open for writing elsewhere") as tried:
        before = program.contents(project)
        with held(staged):
            program.refuse(project, *EXTRACT, says=["shard-00001.h5 cannot be read", "Another process"])
        tried.compare(before, without_locks(program.contents(project), before))
        program.succeed(project, *EXTRACT)
        tried.compare(program.contents(made.root / SET), program.contents(project / SET))


CLOSED = {
    "images": (IMAGES, TRAIN),
    "data set": (str(Path(IMAGES).parent), TRAIN),
    "set's manifest": (f"{SET}/manifest.json", TRAIN),
    "set's manifest, extraction": (f"{SET}/manifest.json", EXTRACT),
    "set": (str(SET), VERIFY),
    "sets": (str(SET.parent), ("features", "list")),
    "set, extraction": (str(SET), EXTRACT),
    "shard": (SHARD, VERIFY),
    "run": (f"{RUN}/config.json", TRAIN),
    "checkpoint": (".pipeline/checkpoints", TRAIN),
    "sweep": (".pipeline/sweep", SWEEP),
    "report": (f"{RUN}/rounds.csv", ("report",)),
    "analysis": ("analysis", ("report",)),
    "presets": ("presets", ("preset",)),
}


def but_locks(project):
    """Return all files but those of locks, which name their last holder."""
    return {name: content for name, content in program.contents(project).items() if "/locks/" not in name}


@pytest.mark.skipif(os.geteuid() != 0, reason="taking another user's rights needs root")
@pytest.mark.parametrize("name", usually(CLOSED, ("data set", "shard", "checkpoint")))
def test_file_or_folder_without_permission_is_reported_and_unchanged(made, trial, name):
    path, command = CLOSED[name]
    with tempfile.TemporaryDirectory() as place, trial("file or folder without permission") as tried:
        Path(place).chmod(0o755)
        project, log = Path(place) / "project", Path(place) / "log"
        shutil.copytree(made.root, project)
        if command == TRAIN:
            program.unfinish_run(project)
        (project / "presets").mkdir()
        log.touch()
        for one in (log, project, *project.rglob("*")):
            os.chown(one, NOBODY, NOBODY)
        before = but_locks(project)
        mode = (project / path).stat().st_mode
        (project / path).chmod(0)
        line = program.refuse(
            project,
            *command,
            says=["Permission denied", "permissions", path],
            log=log,
            under=program.Conditions(uid=NOBODY),
        )
        assert "delete" not in line and "missing" not in line and "holds no" not in line
        (project / path).chmod(mode)
        tried.compare(before, but_locks(project))
        program.succeed(project, *command, log=log)
