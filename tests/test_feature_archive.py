"""One tar there and back; an archive that is damaged or hostile leaves nothing behind, and nothing outside."""

import hashlib
import io
import json
import os
import tarfile

import h5py
import pytest

from pipeline.errors import PipelineError
from pipeline.feature_store import archive
from tests.test_feature_store import write


@pytest.fixture
def exported(tmp_path):
    write(tmp_path / "staging", tmp_path / "sets" / "mine")
    archive.write(tmp_path / "sets" / "mine", tmp_path / "mine.tar")
    return tmp_path / "mine.tar"


def members(file):
    with tarfile.open(file) as tar:
        return [(member, tar.extractfile(member).read() if member.isreg() else b"") for member in tar]


def rewrite(file, parts):
    with tarfile.open(file, "w") as tar:
        for member, data in parts:
            if member.isreg():
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def refused(file, tmp_path, match):
    outside = sorted(path for path in tmp_path.rglob("*") if "received" not in path.parts)
    with pytest.raises(PipelineError, match=match):
        archive.read(file, tmp_path / "received")
    assert not list((tmp_path / "received").glob("*")) if (tmp_path / "received").exists() else True
    assert sorted(path for path in tmp_path.rglob("*") if "received" not in path.parts) == outside


def test_there_and_back(exported, tmp_path):
    path = archive.read(exported, tmp_path / "received")
    assert path == tmp_path / "received" / "mine"
    original = tmp_path / "sets" / "mine"
    for file in original.glob("*"):
        assert file.read_bytes() == (path / file.name).read_bytes()
    assert archive.read(exported, tmp_path / "received") == path  # again: already there
    assert archive.read(exported, tmp_path / "received", "other").name == "other"
    archive.write(path, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == exported.read_bytes()


def test_the_manifest_is_read_without_the_rest(exported, tmp_path):
    (tmp_path / "head.tar").write_bytes(exported.read_bytes()[:8192])
    assert archive.manifest_of(tmp_path / "head.tar") == archive.manifest_of(exported)


def test_another_set_in_the_place_is_kept(exported, tmp_path):
    write(tmp_path / "staging2", tmp_path / "received" / "mine", timestep=7)
    before = (tmp_path / "received" / "mine" / "manifest.json").read_bytes()
    with pytest.raises(PipelineError, match="holds another feature set .*--as"):
        archive.read(exported, tmp_path / "received")
    assert (tmp_path / "received" / "mine" / "manifest.json").read_bytes() == before


def test_a_corrupt_set_is_not_exported(tmp_path):
    write(tmp_path / "staging", tmp_path / "mine")
    shard = tmp_path / "mine" / "shard-00001.h5"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    with pytest.raises(PipelineError, match="shard-00001.h5 is corrupt .*nothing was exported"):
        archive.write(tmp_path / "mine", tmp_path / "mine.tar")
    assert not list(tmp_path.glob("mine.tar*"))


@pytest.mark.parametrize("keep", [0, 100, 600, 5000, 20_000, 40_000])
def test_a_tar_that_is_cut_short(exported, tmp_path, keep):
    data = exported.read_bytes()
    assert keep < len(data) - 10_240
    exported.write_bytes(data[:keep])
    refused(exported, tmp_path, "is no whole tar|cut short|does not come first")


def test_a_flipped_byte(exported, tmp_path):
    data = exported.read_bytes()
    shard = members(exported)[2][1]
    header, content = data.index(shard) - 512, data.index(shard) + len(shard) // 2
    for position, match in ((content, "shard-00000.h5 is corrupt"), (header, "cut short|no whole tar|refused")):
        flipped = bytearray(data)
        flipped[position] ^= 1
        exported.write_bytes(flipped)
        refused(exported, tmp_path, match)


def test_a_path_that_leads_outside(exported, tmp_path):
    for name in ("../mine/basis.h5", "/tmp/evil/basis.h5", "mine/../../basis.h5"):
        parts = members(exported)
        parts[1][0].name = name
        rewrite(tmp_path / "evil.tar", parts)
        refused(tmp_path / "evil.tar", tmp_path, "is refused: it holds")
        parts[0][0].name = f"{os.path.dirname(name)}/manifest.json"
        rewrite(tmp_path / "evil.tar", parts)
        refused(tmp_path / "evil.tar", tmp_path, "manifest does not come first|is refused")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_links_and_devices(exported, tmp_path, kind):
    for position in (0, 1):
        parts = members(exported)
        parts[position][0].type, parts[position][0].linkname = kind, "/etc/passwd"
        rewrite(tmp_path / "evil.tar", parts)
        refused(tmp_path / "evil.tar", tmp_path, "link, a device|does not come first")


def test_more_or_twice_or_out_of_order(exported, tmp_path):
    parts = members(exported)
    for changed in ([*parts, parts[-1]], [parts[0], *parts[:0:-1]], parts[1:], [parts[0], parts[1], parts[1]]):
        rewrite(tmp_path / "evil.tar", changed)
        refused(tmp_path / "evil.tar", tmp_path, "is refused|does not come first")


def with_manifest(exported, change):
    parts = members(exported)
    manifest = json.loads(parts[0][1])
    change(manifest)
    parts[0] = (parts[0][0], json.dumps(manifest).encode())
    return parts


def test_a_manifest_that_claims_more_than_the_disk_holds(exported, tmp_path):
    rewrite(tmp_path / "evil.tar", with_manifest(exported, lambda m: m["shards"]["1"].update(bytes=10**15)))
    refused(tmp_path / "evil.tar", tmp_path, "needs 1 PB")


def test_a_manifest_that_names_files_outside_or_is_newer(exported, tmp_path):
    rewrite(tmp_path / "evil.tar", with_manifest(exported, lambda m: m["basis"].update(file="../basis.h5")))
    refused(tmp_path / "evil.tar", tmp_path, "is not a manifest .*basis.file")
    rewrite(tmp_path / "evil.tar", with_manifest(exported, lambda m: m.update(format_version=2)))
    refused(tmp_path / "evil.tar", tmp_path, "has format version 2, this program reads 1: update it")


@pytest.mark.parametrize("trick", ["external link", "soft link", "external storage", "virtual"])
def test_hdf5_that_would_read_other_files(exported, tmp_path, trick):
    """The checksums are right, as an attacker's are; what the shard would read stands elsewhere."""
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as h5:
        h5["label"] = [0, 1, 2, 0]
    parts = members(exported)
    shard = tmp_path / "shard.h5"
    shard.write_bytes(parts[2][1])
    with h5py.File(shard, "r+") as h5:
        shape, dtype = h5["label"].shape, h5["label"].dtype
        del h5["label"]
        if trick == "external link":
            h5["label"] = h5py.ExternalLink(str(secret), "/label")
        elif trick == "soft link":
            h5["label"] = h5py.SoftLink("/index")
        elif trick == "external storage":
            h5.create_dataset("label", shape, dtype, external=[(str(secret), 0, 32)])
        else:
            layout = h5py.VirtualLayout(shape, dtype)
            layout[:] = h5py.VirtualSource(str(secret), "label", shape)
            h5.create_virtual_dataset("label", layout)
    data = shard.read_bytes()
    manifest = json.loads(parts[0][1])
    manifest["shards"]["0"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    rewrite(
        tmp_path / "evil.tar", [(parts[0][0], json.dumps(manifest).encode()), parts[1], (parts[2][0], data), *parts[3:]]
    )
    refused(tmp_path / "evil.tar", tmp_path, "link to somewhere else|stand in another file")
