"""Every method's local training on a GPU that is not there: devices, dtypes, and how often a step waits."""

import pytest
import torch

from pipeline.settings import params
from stages.train_fl import methods, models
from stages.train_fl.client_data import Batches, ClientData
from stages.train_fl.encoders import EncoderSettings
from stages.train_fl.guidance import GuidanceTargets
from tests.pretended_gpu import on_gpu, pretended
from tests.train_fl.method_fixtures import state_of

CLASSES, PROMPTS, IMAGES, BATCH, EPOCHS = 3, 4, 10, 4, 2
STEPS = EPOCHS * 3  # two full batches and a ragged one per epoch
WAITS = {"fedprox": 2, "fednova": 2}  # per update: the metrics, and the norm of the update for the reported loss


def run(monkeypatch, algorithm, encoder, precision, guidance=None, on_host=False, epochs=EPOCHS):
    """Run one client's update and the server's; return the traffic and both."""
    settings = params.METHODS[algorithm](**({"guidance": guidance} if guidance else {}))
    kind = methods.method_class(settings)
    dims = {"small_cnn": 144}.get(encoder, 512)
    guided = methods.guidance_of(settings) is not None
    parts = kind.model_parts(settings)
    model = models.build(
        EncoderSettings(encoder, "batch", precision, True), CLASSES, 0, dims if guided else None, **parts
    )
    method = methods.build(settings, model, 0.9, 0.01, 2, 1.0)
    own = [value for value in vars(method).values() if isinstance(value, torch.nn.Module)]  # MOON's other models
    weights = state_of(model)
    with pretended(monkeypatch, model, *own) as traffic:
        place = torch.empty_like if on_host else on_gpu
        data = ClientData(
            place(torch.empty(IMAGES, 3, 32, 32, dtype=torch.uint8)),
            place(torch.empty(IMAGES, dtype=torch.int64)),
            GuidanceTargets(
                place(torch.empty(IMAGES, dims)),
                place(torch.empty(IMAGES, PROMPTS, dims)),
                place(torch.empty(IMAGES, dtype=torch.int64)),
            )
            if guided
            else None,
        )
        weights = {name: on_gpu(value) for name, value in weights.items()}
        server = method.init_server(weights)
        state = method.init_client(weights)
        for _ in range(2):  # in the second update there is a state
            traffic.counts.clear()
            augmentation = "views" if method.needs_augmentation else "crop-flip"
            batches = Batches(data, epochs, BATCH, augmentation, torch.Generator(), "cuda")
            update, state, _ = method.client_update(server.weights, server.broadcast, state, batches, 0.1)
        counts = dict(traffic.counts)
        server, _ = method.server_update(server, [update, update])
    return counts, update, state, server


def check_devices(update, state, server):
    for tensors in (update.weights, update.extras, state, server.weights, server.broadcast, server.private):
        # A scalar may stay on the host: FedNova's factor was computed there.
        assert all(value.is_cuda or not value.dim() for value in tensors.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", list(params.METHODS))
def test_a_step_never_waits_for_the_gpu(monkeypatch, algorithm, precision):
    counts, *tensors = run(monkeypatch, algorithm, "small_cnn", precision)
    check_devices(*tensors)
    sent = 2 * EPOCHS + (STEPS if algorithm == "fedcr" else 0)  # an epoch's order and random numbers; FedCR's noise
    assert counts == {"waits": WAITS.get(algorithm, 1), "to gpu": sent}


@pytest.mark.parametrize("algorithm", ["fedavg", "feddifrc", "moon"])
@pytest.mark.parametrize("encoder", ["resnet10", "mobilenet_v2"])
def test_other_networks_do_not_wait_either(monkeypatch, algorithm, encoder):
    counts, *tensors = run(monkeypatch, algorithm, encoder, "bfloat16", epochs=1)
    check_devices(*tensors)
    assert counts == {"waits": 1, "to gpu": 2}


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fednh"])
def test_guidance_on_any_method_does_not_wait(monkeypatch, algorithm):
    counts, *tensors = run(monkeypatch, algorithm, "small_cnn", "float32", guidance={})
    check_devices(*tensors)
    assert counts == {"waits": 1, "to gpu": 2 * EPOCHS}


def test_samples_in_host_memory_are_sent_without_waiting(monkeypatch):
    counts, *tensors = run(monkeypatch, "feddifrc", "small_cnn", "float32", on_host=True)
    check_devices(*tensors)
    assert counts["waits"] == 1 and "to gpu, waiting" not in counts
    assert counts["to gpu"] == EPOCHS + 5 * STEPS  # numbers; images, labels and three tensors of targets


def test_a_wrong_device_and_a_wait_are_noticed(monkeypatch):
    with pretended(monkeypatch) as traffic:
        values = torch.zeros(3, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            values + torch.zeros(3)
        assert not traffic.counts
        values.sum().item()
        assert traffic.counts == {"waits": 1}
        torch.zeros(3).to("cuda")
        assert traffic.counts == {"waits": 1, "to gpu, waiting": 1}
