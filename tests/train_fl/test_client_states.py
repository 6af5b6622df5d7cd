"""Client states: memory up to a limit, at most two files per client, and the same results from files as from memory."""

import itertools

import pytest
import torch

from pipeline.errors import PipelineError
from stages.train_fl import methods, models, rounds
from stages.train_fl.checkpoint import Checkpoint
from stages.train_fl.client_states import ClientStates
from stages.train_fl.encoders import EncoderSettings
from stages.train_fl.engines import local
from stages.train_fl.methods import FedAvg, Scaffold, ServerState
from tests.train_fl.method_fixtures import client, local_sgd, record_layouts, state_of, to_bytes

STATE = 8  # bytes of one state below


def state(value: float) -> dict[str, torch.Tensor]:
    return {"h": torch.full((2,), value, dtype=torch.float32)}


def files(folder) -> list[str]:
    return sorted(path.name.removesuffix(".safetensors") for path in folder.glob("*"))


def test_states_within_the_limit_are_written_for_checkpoints_alone(tmp_path):
    states = ClientStates(tmp_path, memory=2 * STATE)
    states.save(3, 1, state(31))
    states.save(4, 1, state(41))
    assert states.load(3, 1)["h"].tolist() == [31, 31] and not files(tmp_path)
    states.sync()
    written = {name: (tmp_path / f"{name}.safetensors").stat().st_ino for name in files(tmp_path)}
    assert list(written) == ["client-00003-round-00001", "client-00004-round-00001"]
    states.save(3, 2, state(32))
    states.sync()  # writes what changed
    again = {name: (tmp_path / f"{name}.safetensors").stat().st_ino for name in files(tmp_path)}
    assert again.items() >= {"client-00004-round-00001": written["client-00004-round-00001"]}.items()
    assert ClientStates(tmp_path).load(3, 2)["h"].tolist() == [32, 32]


def test_states_beyond_the_limit_leave_memory_the_longest_unused_first(tmp_path):
    states = ClientStates(tmp_path, memory=2 * STATE)
    for client_id, number in ((1, 1), (2, 1), (1, 2), (3, 3)):
        states.save(client_id, number, state(10 * client_id + number))
    assert files(tmp_path) == ["client-00002-round-00001"]  # client 1 has trained since
    for client_id, number in ((1, 2), (2, 1), (3, 3)):
        assert states.load(client_id, number)["h"].tolist() == [10 * client_id + number] * 2
    assert states.load(1, 1) is None and states.load(1, 0) is None


def test_disk_has_two_states_of_a_client_at_most(tmp_path):
    states = ClientStates(tmp_path, memory=0)
    for number in (1, 2):
        states.save(0, number, state(number))
        states.save(1, 1, state(1))
    states.sync()
    states.keep({0: 2, 1: 1})  # a checkpoint names these
    for number in range(3, 7):
        states.save(0, number, state(number))
    assert files(tmp_path) == ["client-00000-round-00002", "client-00000-round-00006", "client-00001-round-00001"]
    states.sync()
    states.keep({0: 6})  # client 1 keeps no state any more
    assert files(tmp_path) == ["client-00000-round-00006"]
    assert ClientStates(tmp_path).load(0, 6)["h"].tolist() == [6, 6]


def test_lost_and_damaged_files_are_noticed_when_a_run_resumes(tmp_path):
    states = ClientStates(tmp_path, memory=0)
    states.save(0, 1, state(1))
    assert states.has_all({}) and states.has_all({0: 1}) and not states.has_all({0: 1, 1: 1})
    file = tmp_path / "client-00000-round-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert not states.has_all({0: 1})


def test_checkpoint_without_its_states_is_not_used(tmp_path, caplog):
    first, second = (Checkpoint(tmp_path, ClientStates(tmp_path / "states")) for _ in range(2))
    first.states.save(0, 1, state(1))
    first.save(rounds.Progress(1, ServerState(state(0)), {0: 1}), {"rows": []})
    found, records = second.load("cpu")
    assert (found.number, found.state_rounds, records) == (1, {0: 1}, {"rows": []})
    (tmp_path / "states" / "client-00000-round-00001.safetensors").unlink()
    assert second.load("cpu") is None and "round-00001 lacks clients' states. The run starts over." in caplog.text


def test_state_that_is_lost_during_a_run_ends_it(tmp_path):
    method, start = _started(Scaffold)
    states = ClientStates(tmp_path, memory=0)
    running = local.run(method, start, [client(5, 0)], _schedule(2, 1), states=states)
    next(running)
    (tmp_path / "client-00000-round-00001.safetensors").unlink()
    with pytest.raises(PipelineError, match=r"^the state of client 0 after round 1 is missing or damaged. Run"):
        next(running)


def _schedule(num_rounds: int, clients_per_round: int) -> rounds.Schedule:
    return rounds.Schedule(num_rounds, clients_per_round, 1, 4, 0.05, 1.0, "none", 0)


def _started(kind):
    method = kind(local_sgd(), kind.Settings(), 4)
    return method, rounds.begin(method, state_of(method.local_sgd.model))


@pytest.mark.parametrize("limit", [0, 3000])  # a state has 323 numbers in 1292 bytes: those of two clients fit
def test_results_do_not_depend_on_the_limit(tmp_path, limit):
    clients = [client(size, seed) for seed, size in enumerate((5, 16, 9, 12))]
    method, start = _started(Scaffold)
    in_memory = list(local.run(method, start, clients, _schedule(5, 2)))
    states = ClientStates(tmp_path, memory=limit)
    for one, other in zip(in_memory, local.run(method, start, clients, _schedule(5, 2), states=states), strict=True):
        assert to_bytes(one.weights) == to_bytes(other.weights)
        assert one.progress.state_rounds == other.progress.state_rounds
    assert files(tmp_path)
    taken_part = set(itertools.chain.from_iterable(done.participants for done in in_memory))
    assert in_memory[-1].progress.state_rounds.keys() == taken_part


def test_resumed_run_has_the_layout_of_the_network(tmp_path, monkeypatch):
    model = models.build(EncoderSettings("resnet10", "batch", "float32", channels_last=True), 3, 0)
    method, clients = methods.build(Scaffold.Settings(), model, 0.9, 0.01, 2), [client(4, 0), client(4, 1)]
    checkpoint = Checkpoint(tmp_path, ClientStates(tmp_path / "states"))
    start = rounds.begin(method, state_of(model))
    (done,) = local.run(method, start, clients, _schedule(1, 2), states=checkpoint.states)
    checkpoint.save(done.progress, {})
    again = Checkpoint(tmp_path, ClientStates(tmp_path / "states"))
    progress, _ = again.load("cpu")
    seen = record_layouts(monkeypatch)
    list(local.run(method, progress, clients, _schedule(3, 2), states=again.states))
    # of ResNet-10's 12 convolutions, 9 are not 1x1, whose kernels are contiguous in both layouts
    assert seen == [([9] * 4, [])] * 4


def test_method_without_client_state_leaves_no_trace(tmp_path):
    method, start = _started(FedAvg)
    states = ClientStates(tmp_path / "states", memory=0)
    *_, last = local.run(method, start, [client(5, 0)] * 3, _schedule(2, 2), states=states)
    states.sync()
    states.keep(last.progress.state_rounds)
    assert last.progress.state_rounds == {} and not (tmp_path / "states").exists()
