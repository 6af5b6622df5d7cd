"""The losses against loop-written float64 references, values worked out by hand, and closed-form gradients."""

import math

import pytest
import torch

from stages.train_fl.losses import gaussian_kl, moon_loss, ndcr_loss, prototype_loss, tdcl_loss, unit

B, P, D = 4, 3, 5
POSITIVE = torch.tensor([0, 2, 1, 1])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw():
    return randn(B, D), randn(B, P, D, seed=1), POSITIVE


def length(v):
    return math.sqrt(sum(float(x) ** 2 for x in v))


def cosine(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) / (length(a) * length(b))


def distance(a, b):
    """Between unit vectors."""
    return math.sqrt(sum((float(x) / length(a) - float(y) / length(b)) ** 2 for x, y in zip(a, b, strict=True)))


def u(z, f):
    return sum(distance(other, f) for other in z) / len(z)


def reference_tdcl(z, f, positive, tau, normalisation="none"):
    us = [[u(z, f[i, p]) for p in range(f.shape[1])] for i in range(len(z))]
    mean_u = sum(map(sum, us)) / (len(z) * f.shape[1])
    total = 0.0
    for i in range(len(z)):
        divisors = {"none": [1.0] * f.shape[1], "representation": us[i], "scalar": [mean_u] * f.shape[1]}
        s = [cosine(z[i], f[i, p]) / divisors[normalisation][p] for p in range(f.shape[1])]
        ratio = sum(math.exp(s[p] / tau) for p in range(len(s)) if p != positive[i]) / math.exp(s[positive[i]] / tau)
        total += math.log(1 + ratio)
    return total / len(z)


@pytest.mark.parametrize("normalisation", ["none", "representation", "scalar"])
def test_tdcl_equals_the_loop(normalisation):
    z, f, positive = draw()
    expected = reference_tdcl(z, f, positive, 0.5, normalisation)
    assert tdcl_loss(z, f, positive, 0.5, normalisation).item() == pytest.approx(expected, abs=1e-12)
    assert tdcl_loss(z, unit(f), positive, 0.5, normalisation, True).item() == pytest.approx(expected, abs=1e-12)


def test_tdcl_by_hand():
    # cosines 1 (positive) and 0: log(1 + e^0 / e^1)
    z = torch.tensor([[2.0, 0.0]])
    f = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    assert tdcl_loss(z, f, torch.tensor([0]), 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)


def test_tdcl_normalisation_by_hand():
    # one sample, z = F+ up to scale and F- orthogonal: U(F+) = 0 is clamped, so use an angle instead
    z = torch.tensor([[1.0, 0.0]])
    f = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])  # cosines 0 and -1; U = sqrt(2) and 2
    expected = math.log(1 + math.exp(-1 / 2))
    assert tdcl_loss(z, f, torch.tensor([0]), 1.0, "representation").item() == pytest.approx(expected, abs=1e-6)
    scalar = math.log(1 + math.exp(-1 / ((math.sqrt(2) + 2) / 2)))
    assert tdcl_loss(z, f, torch.tensor([0]), 1.0, "scalar").item() == pytest.approx(scalar, abs=1e-6)


def test_tdcl_of_equal_representations_is_log_of_their_number():
    z, f, positive = draw()
    assert tdcl_loss(z, f[:, :1].expand(-1, P, -1), positive, 0.04).item() == pytest.approx(math.log(P))


@pytest.mark.parametrize("normalisation", ["none", "representation", "scalar"])
def test_tdcl_does_not_depend_on_batch_order_nor_on_lengths(normalisation):
    z, f, positive = draw()
    order = torch.tensor([2, 0, 3, 1])
    loss = tdcl_loss(z, f, positive, 0.04, normalisation).item()
    shuffled = tdcl_loss(z[order], f[order], positive[order], 0.04, normalisation)
    assert shuffled.item() == pytest.approx(loss, abs=1e-10)
    assert tdcl_loss(7 * z, 3 * f, positive, 0.04, normalisation).item() == pytest.approx(loss, abs=1e-10)


@pytest.mark.parametrize("normalisation", ["none", "representation"])
def test_tdcl_of_a_sample_does_not_depend_on_representations_of_others(normalisation):
    z, f, positive = draw()
    other = f.clone()
    other[1:] = randn(B - 1, P, D, seed=9)

    def first_samples_share(representations):
        total = tdcl_loss(z, representations, positive, 0.3, normalisation) * B
        one = representations.clone()
        one[0] = representations[0, :1]  # all equal: this sample's term becomes log P
        return (total - tdcl_loss(z, one, positive, 0.3, normalisation) * B).item()

    assert first_samples_share(other) == pytest.approx(first_samples_share(f), abs=1e-10)


@pytest.mark.parametrize("normalised", [False, True])
def test_tdcl_gradient_equals_the_closed_form(normalised):
    """dL/dz_i = (-q (F+^ - c+ z^)/U+ + q sum_j r_j (F_j^ - c_j z^)/U_j) / (B tau |z_i|), U without gradient."""
    z, f, positive = draw()
    tau = 0.4
    z.requires_grad_()
    tdcl_loss(z, f, positive, tau, "representation" if normalised else "none").backward()
    for i in range(B):
        norm = length(z[i].detach())
        zh, fh = z[i].detach() / norm, [f[i, p] / length(f[i, p]) for p in range(P)]
        c = [float(zh @ fh[p]) for p in range(P)]
        us = [u(z.detach(), f[i, p]) if normalised else 1.0 for p in range(P)]
        e = [math.exp(c[p] / us[p] / tau) for p in range(P)]
        pos, negatives = int(positive[i]), [p for p in range(P) if p != positive[i]]
        q = 1 - e[pos] / sum(e)
        gradient = -q * (fh[pos] - c[pos] * zh) / us[pos]
        for p in negatives:
            gradient += q * e[p] / sum(e[n] for n in negatives) * (fh[p] - c[p] * zh) / us[p]
        assert torch.allclose(z.grad[i], gradient / (B * tau * norm), atol=1e-12)


def test_ndcr_equals_the_loops():
    z, h = randn(B, D), randn(B, D, seed=1)
    l2 = sum((float(z[i, q]) - float(h[i, q])) ** 2 for i in range(B) for q in range(D)) / B
    normalised = sum(distance(z[i], h[i]) ** 2 for i in range(B)) / B
    kl = 0.0
    for i in range(B):
        p = [math.exp(float(x) / length(h[i])) for x in h[i]]
        q = [math.exp(float(x) / length(z[i])) for x in z[i]]
        kl += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True)) / B
    assert ndcr_loss(z, h, "l2").item() == pytest.approx(l2, abs=1e-12)
    assert ndcr_loss(z, h).item() == pytest.approx(normalised, abs=1e-12)
    assert ndcr_loss(z, h, "kl").item() == pytest.approx(kl, abs=1e-12)
    assert ndcr_loss(z, unit(h), "kl", denoised_is_unit=True).item() == pytest.approx(kl, abs=1e-12)


def test_ndcr_by_hand():
    # unit vectors at 90 degrees: |z - h|^2 = 2; parallel: 0
    z = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    h = torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    assert ndcr_loss(z, h).item() == pytest.approx(1.0)
    assert ndcr_loss(z, h, "l2").item() == pytest.approx((9 + 4 + 16) / 2)


def test_ndcr_gradients_equal_the_closed_forms():
    z, h = randn(B, D).requires_grad_(), randn(B, D, seed=1)
    ndcr_loss(z, h, "l2").backward()
    assert torch.allclose(z.grad, 2 * (z.detach() - h) / B, atol=1e-12)
    z.grad = None
    ndcr_loss(z, h).backward()
    for i in range(B):
        zi, hi = z[i].detach() / length(z[i].detach()), h[i] / length(h[i])
        expected = -2 * (hi - float(zi @ hi) * zi) / (B * length(z[i].detach()))
        assert torch.allclose(z.grad[i], expected, atol=1e-12)


def test_the_kl_form_is_a_thousandth_of_the_l2_form_at_512_dimensions():
    z, h = randn(8, 512), randn(8, 512, seed=1)
    assert (ndcr_loss(z, h, "kl") / ndcr_loss(z, h)).item() == pytest.approx(1 / (2 * 512), rel=0.05)


def test_zero_embedding_gives_no_nan():
    z = torch.zeros(2, D, requires_grad=True)
    loss = tdcl_loss(z, randn(2, P, D).float(), POSITIVE[:2], 0.04) + ndcr_loss(z, torch.zeros(2, D))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_moon_equals_the_loop(temperature):
    z, g, p = randn(B, D), randn(B, D, seed=1), randn(B, D, seed=2)
    total = 0.0
    for i in range(B):
        a, b = math.exp(cosine(z[i], g[i]) / temperature), math.exp(cosine(z[i], p[i]) / temperature)
        total -= math.log(a / (a + b))
    assert moon_loss(z, g, p, temperature).item() == pytest.approx(total / B, abs=1e-12)


def test_moon_at_infinite_temperature_is_log_2_without_gradient():
    z = randn(B, D).requires_grad_()
    loss = moon_loss(z, randn(B, D, seed=1), randn(B, D, seed=2), math.inf)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and not z.grad.any()


def test_prototype_loss_equals_the_loop_and_skips_classes_without_prototype():
    z, prototypes, labels = randn(B, D), randn(3, D, seed=1), torch.tensor([0, 2, 1, 2])
    known = torch.tensor([True, True, False])
    total = 0.0
    for i in range(B):
        if known[labels[i]]:
            total += sum((float(z[i, q]) - float(prototypes[labels[i], q])) ** 2 for q in range(D))
    assert prototype_loss(z, labels, prototypes, known).item() == pytest.approx(total / (B * D), abs=1e-12)


def test_gaussian_kl_equals_the_loop_and_an_integral():
    m, n, s, t = randn(B, D), randn(B, D, seed=1), randn(B, D, seed=2).exp(), randn(B, D, seed=3).exp()
    total = 0.0
    for i in range(B):
        for q in range(D):
            a, b, c, d = (float(x[i, q]) for x in (m, s, n, t))
            total += math.log(d / b) + (b**2 + (a - c) ** 2) / (2 * d**2) - 0.5
    assert gaussian_kl(m, s, n, t).item() == pytest.approx(total / B, abs=1e-10)
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    p, q = (torch.distributions.Normal(*v).log_prob(x) for v in ((0.5, 1.2), (-0.3, 0.8)))
    integral = torch.trapezoid(p.exp() * (p - q), x)
    one = [torch.tensor([[v]], dtype=torch.float64) for v in (0.5, 1.2, -0.3, 0.8)]
    assert gaussian_kl(*one).item() == pytest.approx(integral.item(), abs=1e-6)
