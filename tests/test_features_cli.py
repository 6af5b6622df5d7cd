"""`pipeline features`: list, show, verify, diff, export and import, as a user sees them."""

import json
import os
import shutil

import h5py
import numpy as np
import pytest

from pipeline.feature_store import FeatureSet, FileEntry, comparison, listing
from tests.conftest import invoke, write_params
from tests.test_feature_store import D, P, features, forge, open_writer, put, write


def project_with_one_set(root):
    """Write a project with a feature set named "one"."""
    write_params(root, {})
    write(root / "made", root / "data" / "features" / "one")
    return root


@pytest.fixture
def root(tmp_path):
    return project_with_one_set(tmp_path)


def run(root, *arguments, code=0):
    result = invoke(root, "features", *arguments)
    assert result.exit_code == code, result.output
    return result.output


def damage(file, position=-1):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.unlink()
    file.write_bytes(data)


def test_list_shows_complete_broken_partial_and_unfinished_sets(root):
    sets = root / "data" / "features"
    for name in ("broken", "partial", "cut"):
        shutil.copytree(sets / "one", sets / name)
    (sets / "broken" / "manifest.json").write_text("{")
    (sets / "partial" / "shard-00001.h5").unlink()
    (sets / "cut" / "shard-00001.h5").write_bytes(b"short")
    write(root / ".pipeline" / "staging" / "next", shards=[0], timestep=7)
    lines = run(root, "list").splitlines()
    states = dict(line.split(": ", 1) for line in lines if not line.startswith(" "))
    assert states["one"] == "complete"
    assert states["broken"].startswith("broken: ") and "is not a manifest" in states["broken"]
    assert states["partial"] == "2 of 3 shards here. `dvc pull` the others."
    assert "shard-00001.h5 has 5 bytes" in states["cut"]
    assert states["next"].startswith("1 of 3 shards. Run `pipeline extract-features`")
    found = {one["name"]: one for one in json.loads(run(root, "list", "--json"))}
    assert (found["one"]["rows"], found["one"]["timestep"], found["next"]["timestep"]) == (10, 300, 7)
    assert found["one"]["storage"] == "float16" and "3 prompts; float16, " in "".join(lines)
    assert found["broken"]["rows"] is None


def test_show_describes_a_set_and_a_tar_alike(root):
    card = run(root, "show", "one")
    fingerprint = FeatureSet(root / "data" / "features" / "one").manifest.fingerprint
    assert fingerprint in card and "at timestep 300, 32 px, in float32" in card
    assert f"up_blocks.1 (columns 0 to {D - 1})" in card and f"{P} per image, of a, b, c" in card
    run(root, "export", "one", "-o", str(root / "one.tar"))
    assert run(root, "show", str(root / "one.tar")) == card
    assert json.loads(run(root, "show", "one", "--json"))["fingerprint"] == fingerprint
    assert "Available feature sets: one." in run(root, "show", "two", code=1)


def test_verify_reports_every_problem_with_a_remedy(root):
    assert "one: complete" in run(root, "verify") and "every byte" in run(root, "verify", "--full", "one")
    path = root / "data" / "features" / "one"
    damage(path / "shard-00000.h5")
    (path / "shard-00001.h5").unlink()
    (path / "shard-00009.h5").write_bytes(b"")
    quick = run(root, "verify", code=1)
    assert "shard-00001.h5 is missing" in quick and "shard-00009.h5 is not in the manifest" in quick
    full = run(root, "verify", "--full", code=1)
    assert "shard-00000.h5 is corrupt (SHA-256 differs" in full and "shard-00001.h5 is missing" in full
    assert "`dvc pull` a good copy" in full and "Traceback" not in full


def rewritten(root, name, change):
    """Make a copy of set `one` with one changed shard and correct checksums."""
    writer = open_writer(root / f"staging-{name}")
    source = open_writer(root / "made")
    source.has_basis()
    writer.write_basis(source.basis())
    for shard in range(3):
        rows = features(writer.plan.shard_rows(shard))
        writer.write_shard(shard, change(rows) if shard == 1 else rows, 0)
    writer.publish(root / "data" / "features" / name)


def test_verify_checks_values_of_rows_with_correct_checksums(root):
    def not_finite(rows):
        rows.denoised[2, 1] = np.inf
        return rows

    def other_label(rows):
        rows.label[0] = 99
        return rows

    def other_rows(rows):
        rows.index[:] += 1
        return rows

    import pipeline.feature_store.writer as writer_module

    real, writer_module.np.isfinite = np.isfinite, lambda values: np.ones_like(values, bool)
    try:
        rewritten(root, "infinite", not_finite)
    finally:
        writer_module.np.isfinite = real
    rewritten(root, "labels", other_label)
    rewritten(root, "shifted", other_rows)
    assert "features near row 0 are not finite" in run(root, "verify", "--full", "infinite", code=1)
    assert "has a label outside 0 to 2" in run(root, "verify", "labels", code=1)
    assert "does not hold samples 4 to 7 in order" in run(root, "verify", "shifted", code=1)


def test_verify_checks_the_checksum_of_each_row(root):
    """The checksum of the file was corrected in the manifest, but not that of the changed row."""
    path = root / "data" / "features" / "one"
    shard = path / "shard-00002.h5"
    copy = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(copy)
    with h5py.File(shard, "r+") as h5:
        h5["denoised"][1, 0] = 3
    from pipeline import provenance

    manifest = json.loads((path / "manifest.json").read_text())
    manifest["shards"]["2"]["sha256"] = provenance.file_sha256(shard)
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "1 rows are corrupt, the first is row 1" in run(root, "verify", "--full", code=1)


def test_diff_shows_settings_and_numbers(root):
    write(root / "other", root / "data" / "features" / "two", timestep=100, noise_seed=3)
    output = run(root, "diff", "one", "two")
    assert "different features (fingerprints differ)" in output
    assert "content.timestep: 300 | 100" in output and "content.noise_seed: 0 | 3" in output
    assert "denoised, up_blocks.1: 0.00 % of the numbers differ" in output

    def nudge(rows):
        rows.denoised[0, 2] += np.float16(0.5)
        return rows

    rewritten(root, "three", nudge)
    sets = root / "data" / "features"
    denoised, prompted = comparison.numbers(sets / "one", sets / "three")
    assert (denoised.largest, prompted.largest) == (pytest.approx(0.5, abs=1e-3), 0)
    assert denoised.share_unequal == pytest.approx(1 / (10 * D))
    assert denoised.mean == pytest.approx(0.5 / (10 * D), abs=1e-4)
    assert "same features (fingerprints are equal)" in run(root, "diff", "one", "three")
    run(root, "export", "two", "-o", str(root / "two.tar"))
    assert "content.timestep: 300 | 100" in run(root, "diff", "one", str(root / "two.tar"))
    assert json.loads(run(root, "diff", "one", "two", "--json"))["settings"]


def test_storage_is_named_on_both_sides(root):
    write(root / "other", root / "data" / "features" / "two", storage="int8")
    assert "content.storage: float16 | int8" in run(root, "diff", "one", "two")
    assert "content.storage: int8 | float16" in run(root, "diff", "two", "one")
    assert "storage" not in run(root, "diff", "one", "one")


def test_settings_that_made_a_set_are_shown_and_compared(root):
    sets = root / "data" / "features"
    for name, settings in (
        ("two", {"timestep": 300, "basis": {"images": 4}}),
        ("three", {"timestep": 100, "basis": None, "denoise_prompt": ""}),
    ):
        shutil.copytree(sets / "one", sets / name)
        forge(sets / name, put("provenance", "settings", value=settings))
    assert "timestep: 300, basis.images: 4" in run(root, "show", "two") and "settings " not in run(root, "show", "one")
    assert 'basis: null, denoise_prompt: ""' in run(root, "show", "three")  # as in params.yaml
    assert "provenance.settings.timestep: 300 | 100" in run(root, "diff", "two", "three")
    assert "settings" not in run(root, "diff", "one", "two")  # a set of an earlier version has none


def test_export_and_import(root, tmp_path_factory):
    run(root, "export", "one", "-o", str(root / "one.tar"))
    other = tmp_path_factory.mktemp("other")
    write_params(other, {})
    output = run(other, "import", str(root / "one.tar"))
    assert (
        str(other / "data" / "features" / "one") in output and "params.yaml trains from digits-tiny-sd-t300" in output
    )
    assert "one: intact, every byte" in run(other, "verify", "--full")
    used = ("import", str(root / "one.tar"), "--as", "digits-tiny-sd-t300")
    assert "dvc" not in run(other, *used)
    (other / "dvc.yaml").touch()
    assert "`dvc repro` would delete it. Run `dvc commit -f extract-features` first" in run(other, *used)
    assert "missing.tar cannot be opened (No such file or directory)" in run(other, "import", "missing.tar", code=1)


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_list_neither_changes_nor_hashes_files(root):
    """Another process may be writing or removing a staging folder: its basis is not read, no folder is created."""
    staging = root / ".pipeline" / "staging" / "next"
    write(staging, shards=[0, 1], timestep=7)
    shutil.rmtree(staging / "locks")
    damage(staging / "basis.h5")  # its size is right
    before = contents(root)
    assert "next: 2 of 3 shards" in run(root, "list")
    assert contents(root) == before
    os.truncate(staging / "shard-00001.h5", 5)
    assert "next: 1 of 3 shards" in run(root, "list")
    for broken in ("{", '{"content": {}}', (staging / "plan.json").read_text().replace('"rows": 10', '"rows": 0')):
        (staging / "plan.json").write_text(broken)
        assert "next" not in run(root, "list")


def test_list_is_linear_in_the_number_of_shards(root, monkeypatch):
    """Each entry is compared once, not with all others: a set may have thousands."""
    path = root / "data" / "features" / "one"
    said = json.loads((path / "manifest.json").read_text())
    entry = said["shards"]["2"] | {"bytes": 0, "rows": 1}
    said |= {"rows": 100, "rows_per_shard": 1}
    said["shards"] = {str(n): entry | {"file": f"shard-{n:05d}.h5"} for n in range(100)}
    (path / "manifest.json").write_text(json.dumps(said))
    for n in range(1, 100):
        (path / f"shard-{n:05d}.h5").unlink(missing_ok=True)
        (path / f"shard-{n:05d}.h5").touch()
    (path / "shard-00000.h5").unlink()
    compared, real = [], FileEntry.__eq__
    monkeypatch.setattr(FileEntry, "__eq__", lambda one, other: compared.append(one) or real(one, other))
    (found,) = listing.finished(path.parent)
    assert found.state == "99 of 100 shards here. `dvc pull` the others."
    assert len(compared) <= 100


def test_missing_basis_is_reported(root):
    (root / "data" / "features" / "one" / "basis.h5").unlink()
    assert "one: basis.h5 is missing. `dvc pull` it." in run(root, "list")
    assert "basis.h5 is missing. `dvc pull` it, or run" in run(root, "verify", code=1)


def test_broken_set_does_not_hide_others(root):
    sets = root / "data" / "features"
    shutil.copytree(sets / "one", sets / "two")
    said = json.loads((sets / "two" / "manifest.json").read_text())
    (sets / "two" / "manifest.json").write_text(json.dumps(said | {"provenance": {"backbone": "x"}}))
    listed = run(root, "list")
    assert "one: complete" in listed and "two: broken: " in listed and "(provenance.backbone: " in listed
    assert "provenance.backbone" in run(root, "show", "two", code=1)


def test_leftovers_of_a_killed_process_are_listed_but_not_verified(root):
    sets = root / "data" / "features"
    (sets / "big.tmp").mkdir()
    shutil.copytree(sets / "one", sets / "two.old")
    assert run(root, "verify").splitlines() == ["one: complete (add --full to check every byte)"]
    listed = run(root, "list")
    assert "one: complete" in listed and "big.tmp: is being written, or its process was killed" in listed
    assert "two.old: is an earlier two, left when a process that replaced it was killed. Rename it if" in listed
    assert {one["name"] for one in json.loads(run(root, "list", "--json"))} == {"one", "big.tmp", "two.old"}


HOSTILE = "\x1b]0;pwn\x07\x1b[31mdigits\nfingerprint   0000 verified \u202e\x9b2J"


def test_text_of_a_manifest_is_printed_escaped(root):
    path = root / "data" / "features" / "one"
    shutil.copytree(path, path.with_name("good"))

    def change(said):
        said["provenance"] = {"dataset": HOSTILE, "packages": {HOSTILE: HOSTILE}, "hardware": [HOSTILE],
            "backbone": {"name": HOSTILE, "source": HOSTILE, "revision": HOSTILE}}  # fmt: skip
        said["content"] |= {"class_names": [HOSTILE] * 3, "denoise_prompt": HOSTILE, "layers": {HOSTILE: [0, D]}}
        said["content"] |= {"prompts": [[HOSTILE]] * 3, "dataset_hash": HOSTILE, "dtype": HOSTILE}

    forge(path, change, basis=lambda h5: h5.move("layers/up_blocks.1", f"layers/{HOSTILE}"))
    run(root, "export", "one", "-o", str(root / "one.tar"))
    lines = len(run(root, "show", "good").splitlines())
    commands = (["list"], ["show", "one"], ["show", str(root / "one.tar")], ["verify", "one"], ["diff", "good", "one"],
        ["show", "--json", "one"], ["diff", "--json", "good", "one"])  # fmt: skip
    for command in commands:
        output = run(root, *command)
        assert all(one.isprintable() for one in output.replace("\n", "")), command
        if command[0] == "show" and "--json" not in command:
            assert len(output.splitlines()) == lines and "\\x1b]0;pwn\\x07" in output
    assert json.loads(run(root, "show", "--json", "one"))["provenance"]["dataset"] == HOSTILE
    damage(path / "basis.h5")
    said = json.loads((path / "manifest.json").read_text())
    for change in (
        {HOSTILE: 1},
        {"content": said["content"] | {"layers": {HOSTILE: [1, D]}}},
        {"shards": {HOSTILE: 1}},
    ):
        (path / "manifest.json").write_text(json.dumps(said | change))
        for output in (run(root, "list"), run(root, "show", "one", code=1)):
            assert all(one.isprintable() for one in output.replace("\n", "")), output


def test_diff_explains_why_numbers_are_not_compared(root):
    sets = root / "data" / "features"
    run(root, "export", "one", "-o", str(root / "one.tar"))
    tar = run(root, "diff", "one", str(root / "one.tar")).splitlines()
    assert tar == ["same features (fingerprints are equal)", "numbers not compared: import the archive first"]
    shutil.copytree(sets / "one", sets / "two")
    forge(sets / "two", put("content", "layers", value={"a": [0, 2], "b": [2, D]}), basis=lambda h5: None)
    shown = run(root, "diff", "one", "two")
    assert "numbers not compared: the sets differ in their number of images, layers, dimensions or prompts" in shown
    parsed = json.loads(run(root, "diff", "one", "two", "--json"))
    assert parsed["numbers"] == [] and parsed["numbers_not_compared"].startswith("the sets differ")
    assert json.loads(run(root, "diff", "one", "one", "--json"))["numbers_not_compared"] is None


def test_path_that_is_not_a_set_is_rejected(root, monkeypatch):
    run(root, "export", "one", "-o", str(root / "k.tar"))
    monkeypatch.chdir(root)
    assert "k.tar is a file, not a folder. To unpack an exported set, run `pipeline features import k.tar`" in run(
        root, "verify", "k.tar", code=1
    )
    assert "two does not exist. Available feature sets: one." in run(root, "verify", "two", code=1)
    assert "other/two is not a folder" in run(root, "verify", "other/two", code=1)


def test_export_of_the_working_directory(root, monkeypatch):
    path = root / "data" / "features" / "one"
    (path / "note").symlink_to("nowhere")
    monkeypatch.chdir(path)
    assert run(root, "export", "./").strip() == "one.tar"
    (path / "note").unlink()
    shutil.move(path / "one.tar", root)
    assert "one" in run(root, "import", str(root / "one.tar"))
    monkeypatch.chdir(root)
    shutil.copytree(path, root / "one.old")
    assert "'one.old' is not a valid name for a feature set" in run(root, "export", "./one.old", code=1)
    assert "is not a valid name for a feature set" in run(
        root, "import", str(root / "one.tar"), "--as", "one.old", code=1
    )
