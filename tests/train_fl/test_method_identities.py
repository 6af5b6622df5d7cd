"""Methods with neutral settings equal FedAvg to the byte, after three rounds with two of three clients."""

import math

import pytest

from pipeline.settings.params import Guidance
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.fedavgm import FedAvgM
from stages.train_fl.methods.feddifrc import FedDifRC, GuidanceLoss
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
    return GuidanceLoss(Guidance(**(values | changes)))


def create(method, clients=3, **settings):
    """Return a method with these settings over its defaults, not validated, so that a temperature can be infinite."""
    values = method.Settings().model_dump() | settings
    return method(local_sgd(), method.Settings.model_construct(**values), clients)


def same(method, clients, rounds):
    got = [to_bytes(method.reported_weights(state)) for state in train(method, clients, rounds)]
    expected = [to_bytes(state.weights) for state in train(FedAvg(local_sgd()), clients, rounds)]
    return got == expected


ROUNDS = ((0, 1), (1, 2), (0, 2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: create(FedProx, proximal_mu=0.0),
        lambda: create(Moon, contrastive_weight=0.0),
        lambda: create(Moon, temperature=math.inf),  # the loss is log 2, its gradient exactly zero
        lambda: create(FedAvgM, server_momentum=0.0),
        lambda: create(FedProto, prototype_weight=0.0),
        lambda: FedDifRC(local_sgd(guidance=guidance())),
    ],
    ids=["fedprox mu 0", "moon mu 0", "moon T inf", "fedavgm beta 0", "fedproto lambda 0", "guidance weights 0"],
)
def test_neutral_settings_give_fedavg(make):
    assert same(make(), UNEQUAL, ROUNDS)


def test_fednova_equals_fedavg_if_clients_take_equal_steps():
    assert same(create(FedNova), SAME_STEPS, ROUNDS)
    assert not same(create(FedNova), UNEQUAL, ROUNDS)


def test_feddyn_with_alpha_0_equals_fedavg_for_equal_clients():
    assert same(create(FedDyn, alpha=0.0), EQUAL, ROUNDS)


def test_first_round_of_scaffold_equals_fedavg_for_equal_clients():
    assert same(create(Scaffold), EQUAL, ROUNDS[:1])
    assert same(create(Scaffold, weighting="samples"), UNEQUAL, ROUNDS[:1])
    assert not same(create(Scaffold), EQUAL, ROUNDS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: create(FedProx, proximal_mu=0.1),
        lambda: create(Moon),
        lambda: create(FedAvgM),
        lambda: create(FedProto),
        lambda: create(FedDyn, alpha=0.1),
        lambda: FedDifRC(local_sgd(guidance=guidance(tdcl_weight=1.0))),
        lambda: FedDifRC(local_sgd(guidance=guidance(ndcr_weight=1.0))),
    ],
)
def test_default_settings_differ_from_fedavg(make):
    assert not same(make(), EQUAL, ROUNDS)


def test_guidance_adds_the_same_gradient_to_every_method():
    plain = FedProx(local_sgd(guidance=guidance(tdcl_weight=0.5)), FedProx.Settings(proximal_mu=0.0))
    fedavg = FedAvg(local_sgd(guidance=guidance(tdcl_weight=0.5)))
    start = to_bytes(state_of(local_sgd().model))
    guided = to_bytes(train(plain, UNEQUAL)[-1].weights)
    assert guided == to_bytes(train(fedavg, UNEQUAL)[-1].weights) != start
