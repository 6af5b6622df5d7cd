"""The losses against loop-written references and values worked out by hand."""

import math

import pytest
import torch

from stages.train_fl.losses import ndcr_loss, tdcl_loss


def reference_tdcl(z, f, positive, tau):
    total = 0.0
    for i in range(len(z)):
        s = [float(z[i] @ f[i, p] / (z[i].norm() * f[i, p].norm())) for p in range(f.shape[1])]
        ratio = sum(math.exp(s[p] / tau) for p in range(len(s)) if p != positive[i]) / math.exp(s[positive[i]] / tau)
        total += math.log(1 + ratio)
    return total / len(z)


def draw(b=4, p=3, d=5):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(b, d, generator=g, dtype=torch.float64)
    return z, torch.randn(b, p, d, generator=g, dtype=torch.float64), torch.tensor([0, 2, 1, 1])


def test_tdcl_equals_the_loop():
    z, f, positive = draw()
    assert tdcl_loss(z, f, positive, 0.5).item() == pytest.approx(reference_tdcl(z, f, positive, 0.5), abs=1e-12)


def test_tdcl_by_hand():
    # cosines 1 (positive) and 0: log(1 + e^0 / e^1)
    z = torch.tensor([[2.0, 0.0]])
    f = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    assert tdcl_loss(z, f, torch.tensor([0]), 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)


def test_tdcl_of_equal_representations_is_log_of_their_number():
    z, f, positive = draw()
    assert tdcl_loss(z, f[:, :1].expand(-1, 3, -1), positive, 0.04).item() == pytest.approx(math.log(3))


def test_tdcl_does_not_depend_on_batch_order():
    z, f, positive = draw()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = tdcl_loss(z[order], f[order], positive[order], 0.04)
    assert shuffled.item() == pytest.approx(tdcl_loss(z, f, positive, 0.04).item(), abs=1e-12)


def test_tdcl_normalisation_by_hand():
    # one sample, z = F+ up to scale and F- orthogonal: U(F+) = 0 is clamped, so use an angle instead
    z = torch.tensor([[1.0, 0.0]])
    f = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])  # cosines 0 and -1; U = sqrt(2) and 2
    expected = math.log(1 + math.exp(-1 / 2))
    assert tdcl_loss(z, f, torch.tensor([0]), 1.0, "representation").item() == pytest.approx(expected, abs=1e-6)
    scalar = math.log(1 + math.exp(-1 / ((math.sqrt(2) + 2) / 2)))
    assert tdcl_loss(z, f, torch.tensor([0]), 1.0, "scalar").item() == pytest.approx(scalar, abs=1e-6)


def test_ndcr_by_hand():
    # unit vectors at 90 degrees: |z - h|^2 = 2; parallel: 0
    z = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    h = torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    assert ndcr_loss(z, h).item() == pytest.approx(1.0)
