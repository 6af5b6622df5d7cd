"""A method defined outside of the package: one class suffices to configure, create and run it."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from pydantic import Field

from pipeline.errors import ConfigError, PipelineError
from pipeline.settings import config, params
from pipeline.settings.params import MethodSettings
from stages.train_fl import methods, rounds
from stages.train_fl.engines import local
from stages.train_fl.methods import FedAvg, ServerState
from stages.train_fl.methods.arithmetic import relax
from tests.train_fl.method_fixtures import client, state_of, tiny_model

PARAMS_YAML = Path(__file__).parents[2] / "params.yaml"
ENTRY = {"algorithm": "half-step", "share": 0.25}


@pytest.fixture
def half_step():
    """FedAvg whose server moves part of the way to the mean; registered for one test."""

    class HalfStep(FedAvg):
        class Settings(MethodSettings):
            algorithm: Literal["half-step"] = "half-step"
            share: float = Field(0.5, gt=0, le=1)

        def server_update(self, state, updates):
            mean = self._parameters(self._average(updates, "samples"))
            return ServerState(state.weights | relax(self._parameters(state.weights), mean, self.settings.share)), {}

    yield HalfStep
    del params.METHODS["half-step"]


def test_a_method_needs_only_its_class(half_step):
    entry = config.load(PARAMS_YAML, {"methods.mine": ENTRY}).params.methods["mine"]
    assert methods.method_class(entry) is half_step
    model, clients = tiny_model(), [client(size, seed) for seed, size in enumerate((5, 11, 8))]
    start, ends = state_of(model), {}
    schedule = rounds.Schedule(1, 3, 1, 4, 0.1, 1.0, "none", 0)
    for name, settings in (("fedavg", FedAvg.Settings()), ("mine", entry)):
        method = methods.build(settings, model, 0.9, 0.0, 3)
        (done,) = local.run(method, rounds.begin(method, start), clients, schedule)
        ends[name] = done.weights
    for name, _ in model.named_parameters():
        quarter = start[name] + 0.25 * (ends["fedavg"][name] - start[name])
        torch.testing.assert_close(ends["mine"][name], quarter)


def test_settings_of_a_defined_method_are_validated(half_step):
    with pytest.raises(PipelineError, match=r"methods.mine.share = 2: input should be less than or equal to 1"):
        config.load(PARAMS_YAML, {"methods.mine": ENTRY | {"share": 2}})
    with pytest.raises(PipelineError, match=r"methods.mine.shar is not a known key; did you mean share\?"):
        config.load(PARAMS_YAML, {"methods.mine": {"algorithm": "half-step", "shar": 0.5}})


def test_privacy_is_not_inherited(half_step):
    assert FedAvg.sends_only_weights and not half_step.sends_only_weights


def test_two_methods_cannot_share_an_algorithm(half_step):
    with pytest.raises(ConfigError, match='Algorithm "half-step" is already defined'):

        class Other(FedAvg):
            class Settings(MethodSettings):
                algorithm: Literal["half-step"] = "half-step"


def test_a_configuration_without_registered_methods_names_the_import(monkeypatch):
    monkeypatch.setattr(config, "METHODS", {})
    with pytest.raises(ConfigError, match="Import stages.train_fl.methods"):
        config.load(PARAMS_YAML)


def test_graphs_are_not_inherited_either(half_step):
    model = tiny_model()
    assert FedAvg.capturable and methods.build(FedAvg.Settings(), model, 0.9, 0.0, 1).local_sgd.graphs is not None
    assert not half_step.capturable
    mine = methods.build(config.load(PARAMS_YAML, {"methods.mine": ENTRY}).params.methods["mine"], model, 0.9, 0.0, 1)
    assert mine.local_sgd.graphs is None
    assert methods.build(FedAvg.Settings(), model, 0.9, 0.0, 1, use_graphs=False).local_sgd.graphs is None

    class WithoutSettings(FedAvg):
        """Trains in another way."""

    assert not WithoutSettings.capturable and not WithoutSettings.sends_only_weights
