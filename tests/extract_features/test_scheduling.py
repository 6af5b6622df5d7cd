"""Which process computes which shard."""

import contextlib

import pytest

from pipeline.errors import PipelineError
from stages.extract_features.scheduling import Claim, order_of_shards, own_shards, prepare


def test_own_shards_first_then_the_others():
    assert order_of_shards(5, None, 0, 1) == [0, 1, 2, 3, 4]
    assert order_of_shards(5, None, 1, 2) == [1, 3, 0, 2, 4]
    assert order_of_shards(9, "2:6", 2, 3) == [2, 5, 3, 4]


@pytest.mark.parametrize("text", ["", "1", "2:2", "3:2", "0:6", "-1:2", "a:b"])
def test_invalid_shard_ranges_are_rejected(text):
    with pytest.raises(PipelineError, match=r"Use A:B with 0 <= A < B <= 5 shards"):
        order_of_shards(5, text, 0, 1)


def test_each_claim_comes_with_its_prepared_input():
    claims = [Claim(shard, contextlib.ExitStack()) for shard in (4, 7, 9)]
    assert [(claim.shard, made) for claim, made in prepare(iter(claims), lambda shard: -shard, ahead=True)] == [
        (4, -4), (7, -7), (9, -9)
    ]  # fmt: skip
    assert list(prepare(iter([]), lambda shard: shard, ahead=True)) == []


@pytest.mark.parametrize(("shards", "world_size"), [(13, 16), (13, 4), (40, 8)])
def test_shards_are_divided_before_any_is_claimed_twice_over(shards, world_size):
    own = [own_shards(list(range(shards)), rank, world_size) for rank in range(world_size)]
    assert sorted(sum(own, [])) == list(range(shards))
    assert max(map(len, own)) - min(map(len, own)) <= 1
