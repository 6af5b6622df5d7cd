"""Several processes on one set: no deadlocks, and one process assembles the set."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline import provenance
from pipeline.errors import PipelineError
from pipeline.feature_store import FeatureSet
from stages.extract_features import scheduling
from stages.extract_features.publish import publish
from tests.extract_features.fixtures import extract, project
from tests.test_feature_store import features, open_writer, write


def claims(writer, shards, wait):
    return scheduling.claim_missing(writer, shards, wait, lambda: None)


def is_free(staging, shard):
    with open_writer(staging).lock(f"shard-{shard:05d}", wait=False) as held:
        return held


@pytest.mark.parametrize("ahead", [True, False])
def test_a_process_that_waits_holds_one_shard(tmp_path, ahead):
    writer = write(tmp_path, shards=())
    prepared = scheduling.prepare(claims(writer, [0, 1, 2], wait=not ahead), lambda shard: shard, ahead)
    claim, read = next(prepared)
    assert (claim.shard, read) == (0, 0)
    assert [is_free(tmp_path, shard) for shard in (0, 1, 2)] == [False, not ahead, True]
    claim.held.close()
    for later, _ in prepared:
        later.held.close()


def test_opposite_orders_do_not_wait_for_each_other(tmp_path):
    """Each starts with the other's last shard: holding one while waiting for the next would deadlock."""
    write(tmp_path, shards=())
    begun, written = threading.Barrier(2, timeout=5), []

    def work(order):
        writer = open_writer(tmp_path)
        writer.has_basis()
        first = True
        for claim, shard in scheduling.prepare(claims(writer, order, wait=True), lambda shard: shard, ahead=False):
            if first:
                begun.wait()
                first = False
            with claim.held:
                writer.write_shard(shard, features(writer.plan.shard_rows(shard)), 0)
                written.append(shard)

    threads = [threading.Thread(target=work, args=[order], daemon=True) for order in ([0, 1, 2], [2, 1, 0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(written) == [0, 1, 2]  # each once


def test_processes_that_finish_together_assemble_the_set_once(tmp_path):
    write(tmp_path / "staging")
    published, together = [], threading.Barrier(2, timeout=5)

    def finish(number):
        writer = open_writer(tmp_path / "staging")
        original = writer.publish
        writer.publish = lambda target: (published.append(number), original(target))
        together.wait()
        return publish(writer, tmp_path / "set", None, overwrite=False)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(finish, range(2))) == [tmp_path / "set"] * 2
    assert len(published) == 1
    FeatureSet(tmp_path / "set").verify_files()


def test_shards_of_other_processes_are_verified_before_publishing(tmp_path):
    writer, made_again = write(tmp_path / "staging"), []
    shard = tmp_path / "staging" / "shard-00001.h5"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))

    def again(shards):
        made_again.extend(shards)
        shard.write_bytes(good)
        write(tmp_path / "staging", shards=shards)

    publish(writer, tmp_path / "set", again, overwrite=False)
    assert made_again == [1]
    FeatureSet(tmp_path / "set").verify_files()


def test_a_set_published_meanwhile_is_not_replaced_without_overwrite(tmp_path):
    write(tmp_path / "other", tmp_path / "set", timestep=100, prompts=[["a"], ["b"], ["d"]])
    before = (tmp_path / "set" / "manifest.json").read_bytes()
    writer = write(tmp_path / "staging" / "ours")
    with pytest.raises(
        PipelineError, match=r"finished feature set of other settings or data \(timestep, prompts\)\. .*--overwrite"
    ):
        publish(writer, tmp_path / "set", None, overwrite=False)
    assert (tmp_path / "set" / "manifest.json").read_bytes() == before and not writer.missing_shards
    publish(writer, tmp_path / "set", None, overwrite=True)
    assert FeatureSet(tmp_path / "set").manifest.fingerprint == writer.fingerprint


def test_a_set_of_a_later_format_is_kept_and_one_with_a_damaged_manifest_is_replaced(tmp_path):
    write(tmp_path / "other", tmp_path / "set", timestep=100)
    file, writer = tmp_path / "set" / "manifest.json", write(tmp_path / "staging" / "ours")
    manifest = json.loads(file.read_bytes())
    later = writer.plan.content.model_dump() | {"pooling": "mean"}
    manifest |= {"format_version": 4, "content": later, "fingerprint": provenance.fingerprint(later)}
    file.unlink()
    file.write_text(json.dumps(manifest))
    with pytest.raises(PipelineError, match=r"or data \(pooling\)\. "):
        publish(writer, tmp_path / "set", None, overwrite=False)
    file.write_text(json.dumps(manifest | {"fingerprint": "0" * 64}))
    publish(writer, tmp_path / "set", None, overwrite=False)
    assert FeatureSet(tmp_path / "set").manifest.fingerprint == writer.fingerprint


def test_a_published_set_is_removed_from_staging_only_when_unused(tmp_path):
    used = write(tmp_path / "staging" / "one", tmp_path / "one")
    ending = write(tmp_path / "staging" / "other", tmp_path / "other", timestep=100)
    with used.in_use():  # by a second process that ends with the first
        ending.remove_published_siblings()
        assert publish(used, tmp_path / "one", None, overwrite=False) == tmp_path / "one"
    ending.remove_published_siblings()
    assert [path.name for path in (tmp_path / "staging").iterdir()] == ["other"]


def test_publishing_keeps_the_unfinished_work_of_other_sets(tmp_path):
    """Two sets in one project: finished staging folders are removed, unfinished ones are kept."""
    root = project(tmp_path / "p", images=20, rows_per_shard=10)
    extract(root)
    unfinished = extract(root, "--timestep", "100", "--shard-range", "0:1")
    ended = extract(root, "--timestep", "200")
    assert ended.name.endswith("t200")
    assert (unfinished / "shard-00000.h5").exists()
    staged = sorted((root / ".pipeline" / "staging").iterdir())
    assert len(staged) == 2 and unfinished in staged
    assert np.array_equal(FeatureSet(extract(root, "--timestep", "100")).read(np.arange(20)).index, np.arange(20))
