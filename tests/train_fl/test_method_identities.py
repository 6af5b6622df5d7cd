"""Where a method's own part is switched off, it is FedAvg, to the byte: after three rounds of two of three clients."""

import math

import pytest

from pipeline.settings.params import Guidance as GuidanceParams
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.fedavgm import FedAvgM
from stages.train_fl.methods.feddifrc import GuidanceLoss
from stages.train_fl.methods.feddyn import FedDyn
from stages.train_fl.methods.fednova import FedNova
from stages.train_fl.methods.fedproto import FedProto
from stages.train_fl.methods.fedprox import FedProx
from stages.train_fl.methods.moon import Moon
from stages.train_fl.methods.scaffold import Scaffold
from tests.train_fl.method_fixtures import GUIDANCE, client, local_sgd, state_of, to_bytes, train

EQUAL = [client(8, seed) for seed in range(3)]
UNEQUAL = [client(size, seed) for seed, size in enumerate((5, 11, 8))]
SAME_STEPS = [client(size, seed) for seed, size in enumerate((5, 7, 8))]  # two batches of up to 4 each


def guidance(**changes):
    values = GUIDANCE | dict(tdcl_weight=0.0, ndcr_weight=0.0)
    return GuidanceLoss(GuidanceParams(**(values | changes)))


def same(method, clients, rounds):
    got = [to_bytes(method.reported_weights(state)) for state in train(method, clients, rounds)]
    expected = [to_bytes(state.weights) for state in train(FedAvg(local_sgd()), clients, rounds)]
    return got == expected


ROUNDS = ((0, 1), (1, 2), (0, 2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedProx(local_sgd(), 0.0),
        lambda: Moon(local_sgd(), 0.0, 0.5),
        lambda: Moon(local_sgd(), 5.0, math.inf),  # the loss is log 2, its gradient exactly zero
        lambda: FedAvgM(local_sgd(), 0.0, 1.0),
        lambda: FedProto(local_sgd(), 0.0),
        lambda: FedAvg(local_sgd(guidance=guidance())),
    ],
    ids=["fedprox mu 0", "moon mu 0", "moon T inf", "fedavgm beta 0", "fedproto lambda 0", "guidance weights 0"],
)
def test_it_is_fedavg(make):
    assert same(make(), UNEQUAL, ROUNDS)


def test_fednova_is_fedavg_where_clients_take_as_many_steps():
    assert same(FedNova(local_sgd(), 0.0, 0.0), SAME_STEPS, ROUNDS)
    assert not same(FedNova(local_sgd(), 0.0, 0.0), UNEQUAL, ROUNDS)


def test_feddyn_with_alpha_0_is_fedavg_where_clients_are_equally_large():
    assert same(FedDyn(local_sgd(), 3, 0.0), EQUAL, ROUNDS)


def test_scaffold_is_fedavg_in_its_first_round_where_clients_are_equally_large():
    assert same(Scaffold(local_sgd(), 3, 1.0, "uniform"), EQUAL, ROUNDS[:1])
    assert same(Scaffold(local_sgd(), 3, 1.0, "samples"), UNEQUAL, ROUNDS[:1])
    assert not same(Scaffold(local_sgd(), 3, 1.0, "uniform"), EQUAL, ROUNDS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedProx(local_sgd(), 0.1),
        lambda: Moon(local_sgd(), 5.0, 0.5),
        lambda: FedAvgM(local_sgd(), 0.9, 1.0),
        lambda: FedProto(local_sgd(), 1.0),
        lambda: FedDyn(local_sgd(), 3, 0.1),
        lambda: FedAvg(local_sgd(guidance=guidance(tdcl_weight=1.0))),
        lambda: FedAvg(local_sgd(guidance=guidance(ndcr_weight=1.0))),
    ],
)
def test_switched_on_it_is_not(make):
    assert not same(make(), EQUAL, ROUNDS)


def test_guidance_adds_the_same_pull_on_top_of_another_method():
    plain = FedProx(local_sgd(guidance=guidance(tdcl_weight=0.5)), 0.0)
    fedavg = FedAvg(local_sgd(guidance=guidance(tdcl_weight=0.5)))
    start = to_bytes(state_of(local_sgd().model))
    guided = to_bytes(train(plain, UNEQUAL)[-1].weights)
    assert guided == to_bytes(train(fedavg, UNEQUAL)[-1].weights) != start
