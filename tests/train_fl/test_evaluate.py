"""Accuracy by client and by domain, by hand, also for empty clients and domains."""

import numpy as np
import torch

from stages.train_fl import partitions
from stages.train_fl.client_data import ClientData
from stages.train_fl.data import HeldOut
from stages.train_fl.evaluate import by_client, by_domain

CLASSES = 2


def images(labels, wrong=()):
    """1x1 images whose value is the prediction: their label, or the other class at the positions `wrong`."""
    predicted = [1 - label if position in wrong else label for position, label in enumerate(labels)]
    return torch.tensor(predicted, dtype=torch.uint8).reshape(-1, 1, 1, 1)


def predict(images):
    return images.flatten().to(torch.int64)


def held_out(labels, domains, wrong=()):
    return HeldOut(images(labels, wrong), torch.tensor(labels), torch.tensor(domains))


def clients(*labels):
    return [ClientData(images(own), torch.tensor(own, dtype=torch.int64)) for own in labels]


# the test set has no image of domain "b", and of domain "c" none of class 1
HELD_OUT = held_out(labels=[0, 0, 1, 1, 0, 0], domains=[0, 0, 0, 0, 2, 2], wrong=[1, 4])


def test_domain_without_held_out_images_has_no_accuracy():
    assert by_domain(predict, HELD_OUT, ["a", "b", "c"]) == {"a": 0.75, "c": 0.5}


def test_client_is_evaluated_on_cells_it_shares_with_the_test_set():
    # accuracy of the cells: (a, 0) 1/2, (a, 1) 1, (c, 0) 1/2
    cells = np.array(
        [
            #  a0 a1 b0 b1 c0 c1
            [3, 1, 0, 0, 0, 0],  # (3 * 1/2 + 1 * 1) / 4
            [0, 0, 2, 0, 0, 0],  # only in the domain that the test set lacks
            [0, 1, 1, 0, 2, 3],  # b0 and c1 do not count: (1 * 1 + 2 * 1/2) / 3
            [0, 0, 0, 0, 0, 0],  # an empty client
        ]
    )
    data = clients([0, 0, 0, 1], [0, 0], [1, 0, 0, 0, 1, 1, 1], [])
    rows = by_client(predict, data, HELD_OUT, cells, CLASSES)
    assert [row["num_samples"] for row in rows] == [4, 2, 7, 0]
    assert [row["held_out_accuracy"] for row in rows] == [0.625, None, 2 / 3, None]
    assert [row["train_accuracy"] for row in rows] == [1.0, 1.0, 1.0, None]


def test_empty_domain_is_accepted_without_clients():
    # domain 1 has no training image, and no client
    domains, rng = np.array([0] * 6 + [2] * 4), np.random.default_rng(0)
    parts = partitions.by_domain(domains, [2, 0, 1], 0.5, rng)
    assert [domains[part].tolist() for part in parts] == [[0, 0, 0], [0, 0, 0], [2, 2]]
