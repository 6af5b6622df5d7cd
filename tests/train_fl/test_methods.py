"""Local training and server updates of the methods against loop-written references."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save
from torch.nn import functional

from pipeline import seeding
from pipeline.settings import params
from stages.train_fl import rounds
from stages.train_fl.augmentation import to_model_range
from stages.train_fl.engines import local
from stages.train_fl.losses import prototype_loss, unit
from stages.train_fl.methods import (
    ClientUpdate,
    ServerState,
    build,
    fedcr,
    fednh,
    fednova,
    fedproto,
    method_class,
    scaffold,
)
from stages.train_fl.methods.arithmetic import (
    add_proximal_gradient,
    normaliser,
    proximal_penalty,
    server_momentum_step,
    weighted_mean,
)
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.fedavgm import FedAvgM
from stages.train_fl.methods.feddyn import FedDyn
from stages.train_fl.methods.fedprox import FedProx
from stages.train_fl.methods.moon import Moon
from tests.train_fl.method_fixtures import CLASSES, DIM, GUIDANCE, batches, client, local_sgd, state_of, to_bytes, train

CLIENTS = [client(size, seed) for seed, size in enumerate((5, 11, 8))]
LR, WD = 0.1, 0.01
CHANGES = {  # settings that exercise more code than the defaults, or run faster
    "fedprox": dict(proximal_mu=0.1),
    "scaffold": dict(server_learning_rate=0.7),
    "fednova": dict(proximal_mu=0.1, server_momentum=0.5),
    "fednh": dict(scale=5.0),
    "fedcr": dict(latent_dim=4, num_draws=3, weighting="samples"),
    "feddyn": dict(alpha=0.1),
    "feddifrc": GUIDANCE,
    "feddifrc-self-supervised": GUIDANCE,
}
SECTIONS = [
    settings(**CHANGES.get(name, {}))
    for name, settings in params.METHODS.items()
    if method_class(settings()).needs_labels
]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(section, **guidance):
    model = local_sgd(**method_class(section).model_parts(section))
    return build(section.model_copy(update=guidance), model.model, 0.9, WD, len(CLIENTS))


def reference_sgd(model, weights, data, momentum=0.0, correct=lambda p, g: g, extra=None):
    """Plain loop: the raw gradients (with weight decay) of every step, and the parameters after the last."""
    model.load_state_dict(weights)
    model.train()
    parameters = dict(model.named_parameters())
    buffers = {name: torch.zeros_like(value) for name, value in parameters.items()}
    raw = []
    for batch in batches(data):
        embeddings, logits = model(batch.images)
        loss = functional.cross_entropy(logits, batch.labels)
        if extra:
            loss = loss + extra(parameters, embeddings, batch)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        raw.append({n: g + WD * parameters[n].detach() for n, g in zip(parameters, gradients, strict=True)})
        with torch.no_grad():
            for name, value in parameters.items():
                buffers[name] = momentum * buffers[name] + correct(name, raw[-1][name])
                value -= LR * buffers[name]
    return raw, {name: value.detach().clone() for name, value in parameters.items()}


def close(got, expected, tolerance=2e-6):
    return all(torch.allclose(got[name].double(), expected[name].double(), atol=tolerance) for name in expected)


# What holds for every method


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.algorithm)
def test_round_changes_no_argument_and_keeps_variances_positive(section, guided):
    if guided and not isinstance(section, params.Guidance):
        section = section.model_copy(update={"guidance": params.Guidance(**GUIDANCE)})
    if guided and section.algorithm == "fedcr":
        section = section.model_copy(update={"latent_dim": DIM})  # as long as the targets: no projector
    method = make(section)
    server = method.init_server(state_of(method.local_sgd.model))
    states = [method.init_client(server.weights) for _ in CLIENTS]
    for number in range(3):
        updates = []
        for k in (0, 2) if number == 1 else (0, 1):
            before = [to_bytes(part) for part in (server.weights, server.broadcast, states[k])]
            arguments = server.weights, server.broadcast, states[k]
            update, states[k], metrics = method.client_update(*arguments, batches(CLIENTS[k], number), LR)
            assert [to_bytes(part) for part in arguments] == before
            assert all(map(math.isfinite, metrics.values()))
            assert ("tdcl" in metrics) == (guided or isinstance(section, params.Guidance))
            updates.append(update)
        before = [to_bytes(part) for part in vars(server).values()], [to_bytes(vars(u)["weights"]) for u in updates]
        old, (server, _) = server, method.server_update(server, updates)
        assert ([to_bytes(p) for p in vars(old).values()], [to_bytes(u.weights) for u in updates]) == before
        reported = method.reported_weights(server)
        assert list(reported) == list(old.weights)
        assert reported["encoder.1.running_var"].min() > 0
        expected = weighted_mean([u.weights for u in updates], [u.num_samples for u in updates])
        for name in ("encoder.1.running_var", "encoder.1.running_mean"):
            assert torch.equal(reported[name], expected[name])  # buffers are averaged plainly
        for part in (*vars(server).values(), *states, *(u.extras for u in updates)):
            copied = load(save(part))
            assert all(torch.equal(copied[name], value) for name, value in part.items())


def test_local_sgd_equals_the_plain_loop():
    sgd = local_sgd()
    start = state_of(sgd.model)
    update, metrics = sgd(start, batches(CLIENTS[1]), LR, FedAvg(sgd).objective)
    model = local_sgd().model.train()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=WD, fused=True)
    total = seen = 0
    for batch in batches(CLIENTS[1]):
        loss = functional.cross_entropy(model(batch.images)[1], batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, seen = total + loss.item() * len(batch.labels), seen + len(batch.labels)
    assert to_bytes(update.weights) == to_bytes(state_of(model))
    assert metrics["cross_entropy"] == pytest.approx(total / seen, rel=1e-6)
    assert (update.num_samples, update.num_steps) == (11, 6)


def test_clipping_scales_only_gradients_above_the_limit():
    def step(limit):
        sgd = replace(local_sgd(momentum=0.0, weight_decay=0.0), gradient_clipping=limit)
        start = state_of(sgd.model)
        update, _ = sgd(start, batches(CLIENTS[1], epochs=1, batch_size=11), LR, FedAvg(sgd).objective)
        moved = [(update.weights[name] - start[name]).flatten() / -LR for name in sgd.parameter_names]
        return update.weights, torch.cat(moved)

    free, gradient = step(None)
    assert to_bytes(step(1e6)[0]) == to_bytes(free)
    limit = float(gradient.norm()) / 4
    torch.testing.assert_close(step(limit)[1], gradient / 4, rtol=1e-4, atol=1e-6)


# FedAvg and FedAvgM


def test_weighted_mean_equals_the_loop():
    sets = [{"w": randn(2, 3, seed=k), "count": torch.tensor(k)} for k in range(3)]
    got = weighted_mean(sets, [5, 11, 8])
    for i in range(2):
        for j in range(3):
            expected = sum(n * float(s["w"][i, j]) for n, s in zip((5, 11, 8), sets, strict=True)) / 24
            assert got["w"][i, j].item() == pytest.approx(expected, abs=1e-12)
    assert got["count"] == 0


def test_fedavgm_step_by_hand():
    # x 1, mean 0.4: v = 0.6, x = 1 - 0.5*0.6 = 0.7; then mean 0.9: v = 0.9*0.6 + (0.7 - 0.9) = 0.34, x = 0.7 - 0.17
    x, v = server_momentum_step({"w": torch.tensor([1.0])}, {"w": torch.tensor([0.4])}, {}, 0.9, 0.5)
    assert (x["w"].item(), v["w"].item()) == pytest.approx((0.7, 0.6))
    x, v = server_momentum_step(x, {"w": torch.tensor([0.9])}, v, 0.9, 0.5)
    assert (x["w"].item(), v["w"].item()) == pytest.approx((0.53, 0.34))


def test_fedavgm_equals_the_loop_over_rounds():
    history = train(FedAvgM(local_sgd()), CLIENTS)
    x, v = state_of(local_sgd().model), None
    method = FedAvg(local_sgd())
    for number, (participants, got) in enumerate(zip(((0, 1), (1, 2), (0, 2)), history, strict=True)):
        updates = [method.client_update(x, {}, {}, batches(CLIENTS[k], 100 * number + k), LR)[0] for k in participants]
        mean = weighted_mean([u.weights for u in updates], [u.num_samples for u in updates])
        step = {n: x[n] - mean[n] for n in method.local_sgd.parameter_names}
        v = {n: step[n] + 0.9 * v[n] for n in step} if v else step
        x = mean | {n: x[n] - v[n] for n in step}
        assert close(got.weights, x)


# FedProx


def test_proximal_gradient_equals_autograd_of_the_penalty():
    w = [randn(2, 3).requires_grad_(), randn(4, seed=1).requires_grad_()]
    x = [randn(2, 3, seed=2), randn(4, seed=3)]
    penalty = proximal_penalty(w, x, 0.3)
    expected = 0.15 * sum(
        (a.item() - b.item()) ** 2
        for p, q in zip(w, x, strict=True)
        for a, b in zip(p.flatten(), q.flatten(), strict=True)
    )
    assert penalty.item() == pytest.approx(expected, abs=1e-12)
    gradients = [torch.ones_like(p) for p in x]
    add_proximal_gradient(gradients, [p.detach() for p in w], x, 0.3)
    for got, autograd in zip(gradients, torch.autograd.grad(penalty, w), strict=True):
        assert torch.allclose(got, 1 + autograd)


def test_fedprox_trains_on_the_paper_loss():
    sgd = local_sgd()
    start = state_of(sgd.model)
    update, _, metrics = FedProx(sgd, FedProx.Settings(proximal_mu=0.5)).client_update(
        start, {}, {}, batches(CLIENTS[1]), LR
    )

    def penalty(parameters, embeddings, batch):
        return 0.25 * sum((value - start[name]).square().sum() for name, value in parameters.items())

    _, expected = reference_sgd(local_sgd().model, start, CLIENTS[1], 0.9, extra=penalty)
    assert close(update.weights, expected)
    assert metrics["proximal"] == pytest.approx(penalty(expected, None, None).item(), rel=1e-4)


# SCAFFOLD


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scaffold_control_is_the_mean_of_raw_gradients(momentum):
    sgd = local_sgd(momentum)
    start = state_of(sgd.model)
    names = sgd.parameter_names
    c = {name: 0.1 * torch.randn(start[name].shape, generator=torch.Generator().manual_seed(1)) for name in names}
    c_i = {name: 0.1 * torch.randn(start[name].shape, generator=torch.Generator().manual_seed(2)) for name in names}
    method = scaffold.Scaffold(sgd, num_clients=5)
    update, state, _ = method.client_update(start, c, c_i, batches(CLIENTS[1]), LR)
    raw, end = reference_sgd(
        local_sgd().model, start, CLIENTS[1], momentum, correct=lambda name, g: g - c_i[name] + c[name]
    )
    assert close(update.weights, end)
    steps = len(raw)
    coefficients = [sum(momentum**m for m in range(steps - k)) for k in range(steps)]  # 1 without momentum
    for name in names:
        mean = sum(a * g[name].double() for a, g in zip(coefficients, raw, strict=True)) / sum(coefficients)
        assert torch.allclose(state[name].double(), mean, atol=1e-5)
        assert torch.allclose(update.extras[name], state[name] - c_i[name])


def test_scaffold_server_update_by_hand():
    method = scaffold.Scaffold(local_sgd(), scaffold.Scaffold.Settings(server_learning_rate=0.5), 4)
    weights = state_of(method.local_sgd.model)
    server = method.init_server(weights)
    assert not any(value.any() for value in server.broadcast.values())
    updates = []
    for k, n in enumerate((5, 11)):
        moved = {name: value + (k + 1 if name in server.broadcast else 0) for name, value in weights.items()}
        extras = {name: torch.full_like(value, 2.0 + k) for name, value in server.broadcast.items()}
        updates.append(ClientUpdate(moved, n, 3, extras))
    new, _ = method.server_update(server, updates)
    for name in server.broadcast:
        assert torch.allclose(new.weights[name], weights[name] + 0.5 * 1.5)  # uniform mean of 1 and 2
        assert torch.allclose(new.broadcast[name], torch.full_like(weights[name], (2 + 3) / 4))  # N = 4
    again, _ = method.server_update(new, updates)
    assert all(torch.allclose(value, torch.full_like(value, 2.5)) for value in again.broadcast.values())


def test_scaffold_server_control_stays_the_mean_of_client_controls():
    method = scaffold.Scaffold(local_sgd(), num_clients=3)
    server = method.init_server(state_of(method.local_sgd.model))
    states = [method.init_client(server.weights) for _ in CLIENTS]
    for participants in ((0, 1), (1, 2), (0, 2)):
        updates = []
        for k in participants:
            update, states[k], _ = method.client_update(
                server.weights, server.broadcast, states[k], batches(CLIENTS[k], k), LR
            )
            updates.append(update)
        server, _ = method.server_update(server, updates)
    for name, value in server.broadcast.items():
        assert torch.allclose(value, sum(state[name] for state in states) / 3, atol=1e-5)


# FedNova


def test_normaliser_equals_its_closed_forms():
    tau, rho, lr_mu = 7, 0.9, 0.05
    assert normaliser(tau, 0.0) == tau
    assert normaliser(tau, rho) == pytest.approx((tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho))
    assert normaliser(tau, 0.0, lr_mu) == pytest.approx((1 - (1 - lr_mu) ** tau) / lr_mu)
    assert normaliser(3, rho, lr_mu) == pytest.approx(5.3725)  # the official optimiser says 7.999


@pytest.mark.parametrize(("momentum", "mu"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.5), (0.9, 0.5)])
def test_normaliser_equals_the_distance_of_sgd_under_a_constant_gradient(momentum, mu):
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], LR, momentum=momentum)
    for _ in range(6):
        optimizer.zero_grad()
        (w + mu / 2 * w.square()).backward()
        optimizer.step()
    assert normaliser(6, momentum, LR * mu) == pytest.approx(-w.item() / LR)


def test_normalised_mean_equals_the_paper():
    x, ys = {"w": randn(4)}, [{"w": randn(4, seed=k)} for k in (1, 2, 3)]
    counts, norms = (5, 11, 8), (3.0, 10.0, 4.5)
    tau_eff = sum(n * a for n, a in zip(counts, norms, strict=True)) / 24
    got = fednova.normalised_mean(x, ys, counts, norms)["w"]
    for i in range(4):
        xi = float(x["w"][i])
        pull = sum(n / 24 * (xi - float(y["w"][i])) / a for n, y, a in zip(counts, ys, norms, strict=True))
        assert got[i].item() == pytest.approx(xi - tau_eff * pull, abs=1e-12)


def test_fednova_does_not_normalise_variances():
    # with steps 1, 10, 10 the coefficients are 7/3, 0.7/3, 0.7/3: the parameters' rule would make 1.0 into -1.24
    method = fednova.FedNova(local_sgd(momentum=0.0))
    weights = state_of(method.local_sgd.model)
    name = "encoder.1.running_var"
    updates = []
    for variance, steps in ((0.05, 1), (0.9, 10), (1.0, 10)):
        values = weights | {name: torch.full_like(weights[name], variance)}
        updates.append(ClientUpdate(values, 8, steps, {"normaliser": torch.tensor(float(steps))}))
    parts = [{name: update.weights[name]} for update in updates]
    assert fednova.normalised_mean({name: weights[name]}, parts, (8, 8, 8), (1, 10, 10))[name][0] < -1.2
    new, _ = method.server_update(ServerState(weights), updates)
    assert new.weights[name].tolist() == pytest.approx([0.65] * 4)


def test_fednova_sends_its_normaliser():
    method = fednova.FedNova(local_sgd(momentum=0.9), fednova.FedNova.Settings(proximal_mu=0.5))
    update, _, _ = method.client_update(state_of(method.local_sgd.model), {}, {}, batches(CLIENTS[1]), LR)
    assert update.extras["normaliser"].item() == normaliser(6, 0.9, 0.05)


def test_fednova_server_momentum_by_hand():
    method = fednova.FedNova(local_sgd(), fednova.FedNova.Settings(server_momentum=0.5))
    weights = state_of(method.local_sgd.model)
    steps = {"normaliser": torch.tensor(3.0)}
    server = ServerState(weights)
    for moved in (-1.0, -1.5, -1.75):  # every client moves by -1, so v = 1, 0.5 + 1, 0.75 + 1
        update = ClientUpdate({name: value - 1 for name, value in server.weights.items()}, 8, 3, steps)
        new, _ = method.server_update(server, [update, update])
        for name in method.local_sgd.parameter_names:
            assert torch.allclose(new.weights[name] - server.weights[name], torch.tensor(moved), atol=1e-5)
        server = new


# FedDyn


def test_feddyn_equals_the_loop_over_rounds():
    alpha, num_clients = 0.3, 3
    x = state_of(local_sgd().model)
    names = local_sgd().parameter_names
    h = [{name: torch.zeros_like(x[name]) for name in names} for _ in range(num_clients)]
    method = FedDyn(local_sgd(0.0), FedDyn.Settings(alpha=alpha), num_clients)
    server, states = method.init_server(x), [method.init_client(x) for _ in range(num_clients)]
    for participants in ((0, 1), (1, 2), (0, 2)):
        updates, ends = [], []
        for k in participants:
            update, states[k], _ = method.client_update(server.weights, {}, states[k], batches(CLIENTS[k]), LR)
            updates.append(update)

            def regulariser(parameters, embeddings, batch, x=x, h=h[k]):
                linear = sum((value * (h[name] - x[name])).sum() for name, value in parameters.items())
                return alpha * linear + alpha / 2 * sum(value.square().sum() for value in parameters.values())

            _, end = reference_sgd(local_sgd().model, x, CLIENTS[k], extra=regulariser)
            assert close(update.weights, end, 1e-5)
            h[k] = {name: h[k][name] + end[name] - x[name] for name in names}
            ends.append(end)
        server, _ = method.server_update(server, updates)
        mean = {name: sum(end[name] for end in ends) / 2 for name in names}
        assert close(method.reported_weights(server), mean, 1e-5)
        point = {name: mean[name] + sum(each[name] for each in h) / num_clients for name in names}
        assert close(server.weights, point, 1e-5)
        x = {name: server.weights[name] for name in x}


def test_engine_reports_the_mean_and_not_the_server_point_of_feddyn():
    method = FedDyn(local_sgd(), FedDyn.Settings(alpha=0.3), 3)
    schedule = rounds.Schedule(2, 3, 1, 4, LR, 1.0, "none", 0)
    start = rounds.begin(method, state_of(method.local_sgd.model))
    reported = [done.weights for done in local.run(method, start, CLIENTS, schedule)]
    served = []

    class Spy(FedDyn):
        def server_update(self, state, updates):
            served.append(self._average(updates, "uniform"))
            return super().server_update(state, updates)

    list(local.run(Spy(local_sgd(), FedDyn.Settings(alpha=0.3), 3), start, CLIENTS, schedule))
    assert all(close(got, mean, 1e-6) for got, mean in zip(reported, served, strict=True))


# MOON


def test_moon_contrasts_with_the_previous_model_from_the_second_participation_on():
    method = Moon(local_sgd())
    start = state_of(method.local_sgd.model)
    for name in method.local_sgd.parameter_names:
        start[name] *= 1.1  # not the weights that the method was made with
    first, state, metrics = method.client_update(start, {}, {}, batches(CLIENTS[1]), LR)
    plain, _, _ = FedAvg(local_sgd()).client_update(start, {}, {}, batches(CLIENTS[1]), LR)
    assert metrics["contrastive"] == 0 and to_bytes(first.weights) == to_bytes(plain.weights)

    frozen = {}
    for name, weights in (("global", start), ("previous", state)):
        frozen[name] = local_sgd().model.eval()
        frozen[name].load_state_dict(weights)

    def contrast(parameters, embeddings, batch):
        with torch.no_grad():
            of_global, of_previous = (frozen[name](batch.images)[0] for name in ("global", "previous"))
        g = functional.cosine_similarity(embeddings, of_global) / 0.5
        p = functional.cosine_similarity(embeddings, of_previous) / 0.5
        return 5.0 * -(g.exp() / (g.exp() + p.exp())).log().mean()

    second, _, metrics = method.client_update(start, {}, state, batches(CLIENTS[1]), LR)
    _, expected = reference_sgd(local_sgd().model, start, CLIENTS[1], 0.9, extra=contrast)
    assert metrics["contrastive"] > 0 and close(second.weights, expected, 1e-5)
    assert to_bytes(state_of(frozen["global"])) == to_bytes(start)


# FedNH


def test_fednh_prototypes_equal_the_loop():
    w = unit(randn(4, 5))
    mu, counts = unit(randn(3, 4, 5, seed=1)), torch.tensor([[2.0, 0, 1, 0], [0, 0, 4, 0], [3, 0, 0, 1]])
    got = fednh.new_prototypes(w, mu, counts.double(), 0.9)
    for c in range(4):
        pooled = sum(float(counts[k, c]) * mu[k, c] for k in range(3))
        expected = w[c]
        if counts[:, c].sum():
            mixed = 0.9 * w[c] + 0.1 * pooled / math.sqrt(float(pooled @ pooled))
            expected = mixed / math.sqrt(float(mixed @ mixed))
        assert torch.allclose(got[c], expected, atol=1e-12)
    assert torch.equal(got[1], w[1])  # no client has class 1


def test_fednh_client_sends_class_means_and_does_not_train_prototypes():
    method = fednh.FedNH(local_sgd(cosine_scale=5.0))
    start = state_of(method.local_sgd.model)
    rows = start[fednh.PROTOTYPES]
    assert torch.allclose(rows @ rows.T, torch.eye(CLASSES), atol=1e-6)
    only_two = replace(CLIENTS[1], labels=CLIENTS[1].labels % 2)
    update, _, _ = method.client_update(start, {}, {}, batches(only_two), LR)
    assert torch.equal(update.weights[fednh.PROTOTYPES], rows)
    assert update.weights["classifier.scale"] != start["classifier.scale"]
    model = local_sgd(cosine_scale=5.0).model.eval()
    model.load_state_dict(update.weights)
    for c in range(CLASSES):
        mine = [i for i in range(len(only_two)) if only_two.labels[i] == c]
        assert update.extras["counts"][c] == len(mine)
        expected = torch.zeros(DIM)
        for i in mine:
            z = model.embed(to_model_range(only_two.images[i : i + 1]))[0].detach()
            expected += z / z.norm()
        assert torch.allclose(update.extras["prototypes"][c], functional.normalize(expected, dim=0), atol=1e-6)
    new, _ = method.server_update(method.init_server(start), [update])
    assert torch.equal(new.weights[fednh.PROTOTYPES][2], rows[2])  # no client has class 2
    assert not torch.equal(new.weights[fednh.PROTOTYPES][0], rows[0])


# FedProto


def test_fedproto_prototypes_equal_the_loop():
    old, known = randn(3, 4), torch.tensor([True, True, False])
    sums, counts = randn(2, 3, 4, seed=1), torch.tensor([[2.0, 0, 1], [3, 0, 0]])
    sums = sums * (counts[:, :, None] > 0)
    got, got_known = fedproto.new_prototypes(old, known, sums, counts.double())
    for q in range(4):
        assert got[0, q].item() == pytest.approx(float(sums[0, 0, q] + sums[1, 0, q]) / 5, abs=1e-12)
        assert got[2, q].item() == pytest.approx(float(sums[0, 2, q]), abs=1e-12)
    assert torch.equal(got[1], old[1]) and got_known.tolist() == [True, True, True]


def test_fedproto_pulls_embeddings_towards_global_prototypes():
    method = fedproto.FedProto(local_sgd(), fedproto.FedProto.Settings(prototype_weight=2.0))
    server = method.init_server(state_of(method.local_sgd.model))
    update, _, metrics = method.client_update(server.weights, server.broadcast, {}, batches(CLIENTS[1]), LR)
    assert metrics["prototype"] == 0
    server, _ = method.server_update(server, [update])
    means = update.extras["sums"] / update.extras["counts"][:, None]
    assert torch.allclose(server.broadcast["prototypes"], means)
    got, _, _ = method.client_update(server.weights, server.broadcast, {}, batches(CLIENTS[1]), LR)

    def attract(parameters, embeddings, batch):
        return 2.0 * prototype_loss(embeddings, batch.labels, means, torch.ones(CLASSES, dtype=torch.bool))

    _, expected = reference_sgd(local_sgd().model, server.weights, CLIENTS[1], 0.9, extra=attract)
    assert close(got.weights, expected, 1e-5)


# FedCR


def product_of_two(a, b):
    """The product of two Gaussians (mean, std), normalised."""
    (m, s), (n, t) = a, b
    variance = 1 / (1 / s**2 + 1 / t**2)
    return (m / s**2 + n / t**2) * variance, math.sqrt(variance)


def test_fedcr_priors_are_products_of_experts():
    method = fedcr.FedCR(local_sgd(latent_dim=4), fedcr.FedCR.Settings(num_draws=2, prior_step=0.5))
    server = method.init_server(state_of(method.local_sgd.model))
    data = [replace(each, labels=each.labels % 2) for each in CLIENTS[:2]]
    updates = [
        method.client_update(server.weights, server.broadcast, {}, batches(d, k), LR)[0] for k, d in enumerate(data)
    ]
    new, _ = method.server_update(server, updates)
    model = local_sgd(latent_dim=4).model.eval()
    for c in range(CLASSES):
        for q in range(4):
            prior = 0.0, 1.0
            for update, each in zip(updates, data, strict=True):
                model.load_state_dict(update.weights)
                for i in range(len(each)):
                    if each.labels[i] == c:
                        features = model.encoder(to_model_range(each.images[i : i + 1]))
                        raw = model.bottleneck.linear(features)[0].tolist()
                        expert = raw[q], math.log(1 + math.exp(raw[4 + q]))
                        prior = product_of_two(prior, expert)
            expected = 0.5 * 0.0 + 0.5 * prior[0], 0.5 * 1.0 + 0.5 * prior[1]
            got = new.broadcast["mean"][c, q].item(), new.broadcast["std"][c, q].item()
            assert got == pytest.approx(expected, abs=1e-5)
    assert new.broadcast["std"][2].tolist() == [1.0] * 4  # no client has class 2


def test_fedcr_keeps_the_prior_of_a_class_without_samples():
    mean, std = torch.full((2, 1), 0.3), torch.full((2, 1), 0.2)
    precision, shift, counts = (
        torch.tensor([[[4.0], [0.0]]]),
        torch.tensor([[[2.0], [0.0]]]),
        torch.tensor([[3.0, 0.0]]),
    )
    new_mean, new_std = fedcr.new_priors(mean, std, precision, shift, counts, 1.0)
    assert new_mean[:, 0].tolist() == pytest.approx([2 / 5, 0.3])
    assert new_std[:, 0].tolist() == pytest.approx([5**-0.5, 0.2])


def test_fedcr_trains_on_the_mean_over_draws_and_the_reverse_divergence():
    draws, beta = 3, 0.1
    method = fedcr.FedCR(local_sgd(latent_dim=4), fedcr.FedCR.Settings(num_draws=draws, kl_weight=beta))
    start = state_of(method.local_sgd.model)
    prior = {"mean": randn(CLASSES, 4).float(), "std": randn(CLASSES, 4, seed=1).float().exp()}
    data = batches(CLIENTS[1], epochs=1, batch_size=11)  # one step
    _, _, metrics = method.client_update(start, prior, {}, data, LR)
    model = local_sgd(latent_dim=4).model.train()
    batch = next(iter(batches(CLIENTS[1], epochs=1, batch_size=11)))
    out = model.bottleneck.linear(model.encoder(batch.images)).detach()
    m, s = out[:, :4], (1 + out[:, 4:].exp()).log()
    noise = torch.randn(draws, 11, 4, generator=seeding.torch_generator(0, "fedcr noise"))
    entropy = divergence = 0.0
    for i in range(11):
        y = int(batch.labels[i])
        for each in range(draws):
            logits = model.classifier(m[i] + s[i] * noise[each, i]).tolist()
            entropy += (math.log(sum(map(math.exp, logits))) - logits[y]) / (11 * draws)
        p = torch.distributions.Normal(prior["mean"][y], prior["std"][y])
        divergence += torch.distributions.kl_divergence(p, torch.distributions.Normal(m[i], s[i])).sum().item() / 11
    assert metrics["cross_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert metrics["divergence"] == pytest.approx(beta * divergence, rel=1e-5)


def test_fedcr_noise_does_not_change_the_order_of_batches():
    method = fedcr.FedCR(local_sgd(latent_dim=4), fedcr.FedCR.Settings(num_draws=2, kl_weight=0.0))
    server = method.init_server(state_of(method.local_sgd.model))
    first, second = batches(CLIENTS[1]), batches(CLIENTS[1])
    method.client_update(server.weights, server.broadcast, {}, first, LR)
    list(second)
    assert torch.equal(first.generator.get_state(), second.generator.get_state())
