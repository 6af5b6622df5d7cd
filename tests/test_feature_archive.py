"""Export and import of a tar; a damaged or hostile archive leaves no files, inside or outside the target folder."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
from pathlib import Path

import h5py
import pytest

from pipeline.errors import PipelineError
from pipeline.feature_store import archive
from tests.test_feature_store import forge, write


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


def test_import_restores_the_exported_set_byte_for_byte(exported, tmp_path, caplog):
    path = archive.read(exported, tmp_path / "received")
    assert path == tmp_path / "received" / "mine"
    original = tmp_path / "sets" / "mine"
    for file in original.glob("*"):
        assert file.read_bytes() == (path / file.name).read_bytes()
    assert not caplog.text
    assert archive.read(exported, tmp_path / "received") == path
    assert f"{path} holds this set already. The rest of {exported} was not checked" in caplog.text
    assert archive.read(exported, tmp_path / "received", "other").name == "other"
    archive.write(path, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == exported.read_bytes()


def test_manifest_is_read_without_the_other_members(exported, tmp_path):
    (tmp_path / "head.tar").write_bytes(exported.read_bytes()[:8192])
    assert archive.manifest_of(tmp_path / "head.tar") == archive.manifest_of(exported)


def test_import_keeps_another_set_of_the_same_name(exported, tmp_path):
    write(tmp_path / "staging2", tmp_path / "received" / "mine", timestep=7)
    before = (tmp_path / "received" / "mine" / "manifest.json").read_bytes()
    with pytest.raises(PipelineError, match="holds another feature set .*--as"):
        archive.read(exported, tmp_path / "received")
    assert (tmp_path / "received" / "mine" / "manifest.json").read_bytes() == before


def test_corrupt_set_is_not_exported(tmp_path):
    write(tmp_path / "staging", tmp_path / "mine")
    shard = tmp_path / "mine" / "shard-00001.h5"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    with pytest.raises(PipelineError, match="shard-00001.h5 is corrupt .*Nothing was exported"):
        archive.write(tmp_path / "mine", tmp_path / "mine.tar")
    assert not list(tmp_path.glob("mine.tar*"))


@pytest.mark.parametrize("keep", [0, 100, 600, 5000, 20_000, 40_000])
def test_truncated_tar_is_rejected(exported, tmp_path, keep):
    data = exported.read_bytes()
    assert keep < len(data) - 10_240
    exported.write_bytes(data[:keep])
    refused(exported, tmp_path, "is not a complete tar|is truncated|is not its first file")


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zstd"])
def test_compressed_tar_is_named_so(exported, tmp_path, kind):
    data = exported.read_bytes()
    exported.write_bytes(
        b"(\xb5/\xfd" + data if kind == "zstd"  # Python has no compressor of it
        else {"gzip": gzip, "bzip2": bz2, "xz": lzma}[kind].compress(data)
    )  # fmt: skip
    refused(exported, tmp_path, rf"is compressed \({kind}\)\. Decompress it")


def test_truncated_tar_of_a_set_that_is_named_like_a_compressed_file(exported, tmp_path):
    exported.write_bytes(b"BZh" + exported.read_bytes()[3:600])
    refused(exported, tmp_path, "is not a complete tar")


def test_flipped_byte_is_found(exported, tmp_path):
    data = exported.read_bytes()
    shard = members(exported)[2][1]
    header, content = data.index(shard) - 512, data.index(shard) + len(shard) // 2
    for position, match in (
        (content, "shard-00000.h5 is corrupt"),
        (header, "is truncated|not a complete tar|is rejected"),
    ):
        flipped = bytearray(data)
        flipped[position] ^= 1
        exported.write_bytes(flipped)
        refused(exported, tmp_path, match)


def test_member_path_outside_the_folder_is_rejected(exported, tmp_path):
    for name in ("../mine/basis.h5", "/tmp/evil/basis.h5", "mine/../../basis.h5"):
        parts = members(exported)
        parts[1][0].name = name
        rewrite(tmp_path / "evil.tar", parts)
        refused(tmp_path / "evil.tar", tmp_path, "is rejected .it has")
        parts[0][0].name = f"{os.path.dirname(name)}/manifest.json"
        rewrite(tmp_path / "evil.tar", parts)
        refused(tmp_path / "evil.tar", tmp_path, "is not its first file|is rejected")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_links_and_devices_are_rejected(exported, tmp_path, kind):
    for position in (0, 1):
        parts = members(exported)
        parts[position][0].type, parts[position][0].linkname = kind, "/etc/passwd"
        rewrite(tmp_path / "evil.tar", parts)
        refused(tmp_path / "evil.tar", tmp_path, "link, a device|is not its first file|has no folders")


def test_extra_duplicate_or_reordered_members_are_rejected(exported, tmp_path):
    parts = members(exported)
    for changed in ([*parts, parts[-1]], [parts[0], *parts[:0:-1]], parts[1:], [parts[0], parts[1], parts[1]]):
        rewrite(tmp_path / "evil.tar", changed)
        refused(tmp_path / "evil.tar", tmp_path, "is rejected|is not its first file")


def with_manifest(exported, change):
    parts = members(exported)
    manifest = json.loads(parts[0][1])
    change(manifest)
    parts[0] = (parts[0][0], json.dumps(manifest).encode())
    return parts


def test_manifest_that_claims_more_than_the_disk_holds_is_rejected(exported, tmp_path):
    rewrite(tmp_path / "evil.tar", with_manifest(exported, lambda m: m["shards"]["1"].update(bytes=10**15)))
    refused(tmp_path / "evil.tar", tmp_path, "needs 1 PB, but .* free")


def test_manifest_that_names_outside_files_or_is_newer_is_rejected(exported, tmp_path):
    rewrite(tmp_path / "evil.tar", with_manifest(exported, lambda m: m["basis"].update(file="../basis.h5")))
    refused(tmp_path / "evil.tar", tmp_path, "is not a manifest .*basis.file")
    rewrite(tmp_path / "evil.tar", with_manifest(exported, lambda m: m.update(format_version=4)))
    refused(tmp_path / "evil.tar", tmp_path, "has format version 4, but this program reads 1, 2 and 3. Update")


@pytest.mark.parametrize("trick", ["external link", "soft link", "external storage", "virtual"])
def test_hdf5_that_refers_to_other_files_is_rejected(exported, tmp_path, trick):
    """The checksums are right, as an attacker would make them; the shard's data are in another file."""
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
    refused(tmp_path / "evil.tar", tmp_path, "link to another place|are in another file")


def header(name, size, kind=b"0"):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def pax(key, value):
    def record(size):
        return f"{size} {key}={value}\n".encode()

    size = next(n for n in range(1, 10**7) if len(record(n)) == n)
    return header("x", size, b"x") + record(size).ljust(-(-size // 512) * 512, b"\0")


LONG = header("x", 512, b"L") + b"a" * 512
HEADERS = {
    "a sparse map of letters": pax("GNU.sparse.map", "a,b"),
    "a sparse size of letters": pax("GNU.sparse.size", "zz"),
    "a chain of long names": LONG * 5000,
    "a chain of records": pax("path", "ab") * 5000,
    "a record of many digits": header("x", 100_010, b"x") + b"1" * 100_000 + b" path=a\n".ljust(512 * 196 - 100_000),
    "an old sparse file": header("mine/basis.h5", 10, tarfile.GNUTYPE_SPARSE) + bytes(512),
    "a contiguous file": header("mine/basis.h5", 10, tarfile.CONTTYPE) + bytes(512),
    "a size below zero": header("mine/basis.h5", -512),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS.keys())
def test_tar_extensions_are_rejected_by_their_header(exported, tmp_path, headers, first):
    """`export` writes none of these; tarfile alone would follow them, recursively or into memory."""
    parts = members(exported)
    rewrite(tmp_path / "head.tar", parts[:1])
    before = b"" if first else (tmp_path / "head.tar").read_bytes()[: 512 + -(-parts[0][0].size // 512) * 512]
    (tmp_path / "evil.tar").write_bytes(before + headers + bytes(1024))
    refused(tmp_path / "evil.tar", tmp_path, "otherwise not a regular file|which has no extended headers")


@pytest.mark.parametrize("kind", [b"x", b"L", b"g", b"0"])
def test_header_that_claims_all_memory_is_rejected(tmp_path, kind):
    """A sparse file of 20 GB."""
    with (tmp_path / "evil.tar").open("wb") as stream:
        stream.write(header("mine/manifest.json", 20 << 30, kind))
        stream.truncate(20 << 30)
    refused(tmp_path / "evil.tar", tmp_path, "no extended headers|manifest has 21474836480 bytes")


def test_header_of_a_member_above_eight_gigabytes_is_read(tmp_path):
    """Such a size is not written in octal digits."""
    (tmp_path / "big.tar").write_bytes(header("mine/manifest.json", 9 << 30))
    refused(tmp_path / "big.tar", tmp_path, f"its manifest has {9 << 30} bytes")


@pytest.mark.parametrize("name", ["mine.old", "mine.tmp", "x.tar", "-x", "..", "a/b", "", "ü", "x" * 81])
def test_ambiguous_set_name_is_rejected(exported, tmp_path, name):
    with pytest.raises(PipelineError, match="is not a valid name for a feature set .1 to 80 letters"):
        archive.read(exported, tmp_path / "received", name)
    if "/" not in name and name.strip("."):
        (tmp_path / "sets" / "mine").rename(tmp_path / "sets" / name)
        with pytest.raises(PipelineError, match="is not a valid name for a feature set"):
            archive.write(tmp_path / "sets" / name, tmp_path / "other.tar")
    assert archive.read(exported, tmp_path / "received", "x" * 80).exists()


def test_problems_of_an_archive_name_it_and_advise_to_get_it_again(exported, tmp_path):
    path = tmp_path / "forged"
    write(tmp_path / "staging", path)
    forge(path, shard=lambda h5, number: h5["prompt_class"].__setitem__(slice(None), 0))
    archive.write(path, tmp_path / "forged.tar")
    refused(
        tmp_path / "forged.tar", tmp_path, r"^\S*/forged.tar/shard-00000.h5 has \d rows without .*\. Get it again\.$"
    )
    rewrite(tmp_path / "evil.tar", with_manifest(exported, lambda said: said.update(rows=0)))
    refused(tmp_path / "evil.tar", tmp_path, r"manifest.json is not a manifest .*\. Get it again\.$")


def test_member_names_are_printed_escaped(exported, tmp_path):
    for position in (1, 2):
        parts = members(exported)
        parts[position][0].name = "mine/\x1b[31m\n"
        rewrite(tmp_path / "evil.tar", parts)
        refused(tmp_path / "evil.tar", tmp_path, r"it has mine/\\x1b\[31m\\n where its manifest names mine/")


def test_set_that_appears_during_an_import_is_kept(exported, tmp_path):
    target = tmp_path / "received" / "mine"

    def appear(size):
        if not target.exists():
            write(tmp_path / "staging2", tmp_path / "elsewhere", timestep=7)
            (tmp_path / "elsewhere").rename(target)

    with pytest.raises(PipelineError, match="holds another feature set"):
        archive.read(exported, tmp_path / "received", advance=appear)
    assert json.loads((target / "manifest.json").read_text())["content"]["timestep"] == 7
    assert [path.name for path in (tmp_path / "received").iterdir()] == ["mine"]


def test_import_keeps_files_that_are_in_its_place(exported, tmp_path):
    target = tmp_path / "received" / "mine"
    target.parent.mkdir()
    target.symlink_to(tmp_path / "nowhere")
    for remove in (target.unlink, None):
        with pytest.raises(PipelineError, match="exists and is not intact .*\\. Move it away"):
            archive.read(exported, tmp_path / "received")
        if remove:
            remove()
            target.mkdir()
            (target / "notes").write_text("mine")
    assert (target / "notes").read_text() == "mine"


def test_second_export_to_one_archive_is_rejected_and_leftovers_are_replaced(exported, tmp_path):
    before, tried = exported.read_bytes(), []

    def another(size):
        if not tried:
            tried.append(size)
            with pytest.raises(PipelineError, match="Another process is writing .*mine.tar. Wait until it has ended"):
                archive.write(tmp_path / "sets" / "mine", exported)

    exported.unlink()
    archive.write(tmp_path / "sets" / "mine", exported, another)
    assert tried and exported.read_bytes() == before
    (tmp_path / "mine.tar.tmp").write_bytes(b"left by a killed process" * 10_000)
    archive.write(tmp_path / "sets" / "mine", exported)
    assert exported.read_bytes() == before and not (tmp_path / "mine.tar.tmp").exists()
    with pytest.raises(PipelineError, match="nowhere/x.tar cannot be written .*Choose another path with -o"):
        archive.write(tmp_path / "sets" / "mine", tmp_path / "nowhere" / "x.tar")


def test_only_an_earlier_export_or_an_empty_file_is_replaced(exported, tmp_path):
    data, path = exported.read_bytes(), archive.read(exported, tmp_path / "received")
    for before in (data, b""):
        exported.write_bytes(before)
        archive.write(path, exported)
        assert exported.read_bytes() == data
    exported.write_text("my thesis")
    with pytest.raises(PipelineError, match="exists, but is not a tar of `pipeline features export`. Remove it"):
        archive.write(path, exported)
    assert exported.read_text() == "my thesis" and sorted(tmp_path.glob("*.tar*")) == [exported]


@pytest.mark.parametrize(
    ("form", "named"),
    [
        (tarfile.GNU_FORMAT, r"folders \(mine is one"),
        (tarfile.PAX_FORMAT, r"extended headers \(\./\./@PaxHeader is one"),
    ],
)
def test_tar_of_a_folder_is_called_neither_damaged_nor_hostile(exported, tmp_path, form, named):
    path = archive.read(exported, tmp_path / "elsewhere")
    with tarfile.open(tmp_path / "plain.tar", "w", format=form) as tar:  # with times in fractions, so pax needs headers
        tar.add(path, path.name)
    with pytest.raises(PipelineError, match=rf"which has no {named}\)\. Ask for one\.$"):
        archive.read(tmp_path / "plain.tar", tmp_path / "received")


def test_set_is_exported_under_its_name_from_any_working_directory(exported, tmp_path, monkeypatch):
    before = exported.read_bytes()
    for folder, path in ((tmp_path / "sets" / "mine", "./"), (tmp_path / "sets", "mine/../mine/")):
        monkeypatch.chdir(folder)
        archive.write(Path(path), exported)
        assert exported.read_bytes() == before
