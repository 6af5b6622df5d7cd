"""FedDifRC's targets and terms, and every entry of params.yaml's `methods`."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.errors import PipelineError
from pipeline.settings import config, params
from stages.train_fl import methods, models
from stages.train_fl.encoders import EncoderSettings
from stages.train_fl.guidance import GuidanceTargets, columns, prepare
from stages.train_fl.losses import ndcr_loss, tdcl_loss
from stages.train_fl.methods import FedAvg, FedDyn, FedProx, GuidanceLoss, SelfSupervisedFedDifRC
from tests.train_fl.method_fixtures import GUIDANCE, batches, client, local_sgd, state_of, tiny_model, to_bytes

LAYERS = {"up_blocks.1": [0, 2], "up_blocks.2": [2, 5], "up_blocks.3": [5, 6]}
SMALL_CNN = EncoderSettings("small_cnn", "batch", "float32", False)
PARAMS_YAML = Path(__file__).parents[2] / "params.yaml"
N, P, D = 5, 3, 6


def section(**changes):
    return params.Guidance(**(GUIDANCE | changes))


def cached():
    g = torch.Generator().manual_seed(0)
    denoised, prompted = torch.rand(N, D, generator=g).half(), torch.rand(N, P, D, generator=g).half()
    return GuidanceTargets(denoised, prompted, torch.tensor([0, 1, 2, 0, 1]))


MEAN, STD = torch.linspace(0, 1, D, dtype=torch.float64), torch.tensor([0.5, 2.0, 0.0, 1.0, 1e-9, 3.0]).double()


def reference(row, scale, keep, unit_length):
    values = []
    for column in keep:
        value = float(row[column])
        if scale != "raw":
            value -= float(MEAN[column])
        if scale == "standardised" and STD[column] > 1e-6:  # a dimension that never varies is left unscaled
            value /= float(STD[column])
        values.append(value)
    length = sum(value**2 for value in values) ** 0.5 if unit_length else 1.0
    return torch.tensor([value / length for value in values])


@pytest.mark.parametrize("form", ["normalised-l2", "l2", "kl"])
@pytest.mark.parametrize("scale", ["raw", "centred", "standardised"])
@pytest.mark.parametrize(("layers", "keep"), [("all", range(6)), (["up_blocks.3", "up_blocks.1"], [5, 0, 1])])
def test_targets_equal_the_loop(scale, layers, keep, form):
    got = prepare(
        cached(), section(tdcl_targets=scale, ndcr_targets=scale, ndcr_form=form, layers=layers), LAYERS, MEAN, STD
    )
    assert got.denoised.dtype == got.prompted.dtype == torch.float32
    for i in range(N):
        expected = reference(cached().denoised[i], scale, keep, form != "l2")
        assert torch.allclose(got.denoised[i], expected, atol=1e-6)
        for p in range(P):
            assert torch.allclose(got.prompted[i, p], reference(cached().prompted[i, p], scale, keep, True), atol=1e-6)


def test_prepared_rows_do_not_depend_on_the_chunk_size(monkeypatch):
    together = prepare(cached(), section(), LAYERS, MEAN, STD)
    monkeypatch.setattr("stages.train_fl.guidance._ROWS", 2)
    parts = prepare(cached(), section(), LAYERS, MEAN, STD)
    assert torch.equal(together.denoised, parts.denoised) and torch.equal(together.prompted, parts.prompted)


def test_unused_representation_becomes_empty():
    assert prepare(cached(), section(tdcl_weight=0.0), LAYERS, MEAN, STD).prompted.shape == (N, 0)
    assert prepare(cached(), section(ndcr_weight=0.0), LAYERS, MEAN, STD).denoised.shape == (N, 0)
    prepare(cached(), section(tdcl_weight=0.0), LAYERS, MEAN, STD).select(torch.tensor([1, 2]))


def test_unknown_layers_are_reported():
    with pytest.raises(PipelineError, match=r"names up_blocks.9, but the feature set has up_blocks.1, "):
        columns(section(layers=["up_blocks.1", "up_blocks.9"]), LAYERS)
    with pytest.raises(PipelineError, match="names no layer"):
        columns(section(layers=[]), LAYERS)


@pytest.mark.parametrize("normalisation", ["none", "representation", "scalar"])
@pytest.mark.parametrize("form", ["normalised-l2", "l2", "kl"])
def test_terms_are_the_weighted_losses_of_the_cached_representations(normalisation, form):
    settings = section(
        tdcl_weight=0.3, ndcr_weight=0.7, temperature=0.2, tdcl_normalisation=normalisation, ndcr_form=form
    )
    z = torch.randn(N, D, generator=torch.Generator().manual_seed(5))
    terms = GuidanceLoss(settings)(z, prepare(cached(), settings, LAYERS, MEAN, STD))
    rows = cached()
    tdcl = tdcl_loss(z, rows.prompted.float(), rows.positive, 0.2, normalisation)
    ndcr = ndcr_loss(z, rows.denoised.float(), form)
    assert terms["tdcl"].item() == pytest.approx(0.3 * tdcl.item(), rel=1e-4)
    assert terms["ndcr"].item() == pytest.approx(0.7 * ndcr.item(), rel=1e-4)


@pytest.mark.parametrize(("off", "left"), [("ndcr_weight", {"tdcl"}), ("tdcl_weight", {"ndcr"})])
def test_each_term_can_be_trained_alone(off, left):
    settings = section(**{off: 0.0})
    sgd = local_sgd(guidance=GuidanceLoss(settings))
    _, metrics = sgd(
        state_of(sgd.model), batches(client(8, 0)), 0.1, methods.build(_fedavg(), sgd.model, 0, 0, 1).objective
    )
    assert set(metrics) - {"cross_entropy"} == left


def test_fewer_layers_train_through_a_projector():
    settings = section(layers=["up_blocks.2"])
    model = models.build(SMALL_CNN, 3, 0, len(columns(settings, LAYERS)))
    assert model.projector.out_features == 3
    rows = prepare(cached(), settings, LAYERS, MEAN, STD)
    data = client(N, 0)
    data = type(data)(data.images, data.labels, rows)
    method = methods.build(_fedavg(guidance=settings), model, 0.9, 0.0, 1)
    start = state_of(model)
    update, _, metrics = method.client_update(start, {}, {}, batches(data), 0.1)
    assert {"tdcl", "ndcr"} < set(metrics)
    assert not torch.equal(update.weights["projector.weight"], start["projector.weight"])


def test_projector_without_gradient_keeps_its_weights_under_every_correction():
    for entry in (FedProx.Settings(proximal_mu=0.1), FedDyn.Settings(alpha=0.1)):
        model = tiny_model()
        model.projector = nn.Linear(6, 2)
        method = methods.build(entry, model, 0.0, 0.0, 2)
        start = state_of(model)
        update, _, _ = method.client_update(start, {}, {}, batches(client(8, 0)), 0.1)
        assert torch.equal(update.weights["projector.weight"], start["projector.weight"])


# Parts of models


def test_further_parts_do_not_change_initial_encoder_weights():
    plain = models.build(SMALL_CNN, 3, 7)
    parts = dict(projection_dim=16), dict(latent_dim=8), dict(cosine_scale=2.0), dict(projection_dim=16, latent_dim=8)
    for part in parts:
        model = models.build(SMALL_CNN, 3, 7, 5, **part)
        assert to_bytes(state_of(model.encoder)) == to_bytes(state_of(plain.encoder))
        embeddings, logits = model(torch.zeros(2, 3, 32, 32))
        assert embeddings.shape == (2, part.get("latent_dim") or part.get("projection_dim") or 144)
        assert model.embedding_dim == embeddings.shape[1] and logits.shape == (2, 3)
        assert model.projector(embeddings).shape == (2, 5)


def test_prototypes_are_unit_rows_with_more_classes_than_dimensions():
    rows = models.CosineClassifier(3, 8, 1.0).prototypes
    assert torch.allclose(rows.norm(dim=1), torch.ones(8))


# The configuration


def _fedavg(**values):
    return FedAvg.Settings(**values)


def test_every_method_entry_of_params_yaml_trains():
    entries = config.load(PARAMS_YAML).params.methods
    assert {entry.algorithm for entry in entries.values()} == set(params.METHODS)
    for entry in entries.values():
        guidance_dim = 6 if methods.guidance_of(entry) else None
        model = models.build(SMALL_CNN, 3, 0, guidance_dim, **methods.method_class(entry).model_parts(entry))
        method = methods.build(entry, model, 0.9, 0.0, 3)
        server = method.init_server(state_of(model))
        update, _, _ = method.client_update(server.weights, server.broadcast, {}, batches(client(8, 0)), 0.1)
        assert set(method.server_update(server, [update])[0].weights) == set(server.weights)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("methods.fedprox.proximal_mu", -1, r"methods.fedprox.proximal_mu = -1: input should be"),
        ("methods.fedprox.mu", 1, r"methods.fedprox.mu is not a known key"),
        ("methods.fedprox-feddifrc.guidance.temperature", 0, r"temperature = 0: input should be greater than 0"),
        ("methods.fedprox-feddifrc.guidance.tempratur", 1, r"tempratur is not a known key; did you mean temperature"),
        ("methods.feddifrc.ndcr_form", "cosine", r"methods.feddifrc.ndcr_form = 'cosine'"),
        ("methods.fedavg.guidance", 1, r"methods.fedavg.guidance = 1: must be a section with its keys below it"),
        ("methods.fedavg", {"guidance": {}}, r"methods.fedavg.algorithm is missing"),
        ("methods.fedavg", 1, r"methods.fedavg = 1: must be a section with its keys below it"),
        ("methods.fedavg.algorithm", "fedsgd", r"methods.fedavg.* 'fednova', 'fedproto', 'fedprox'"),
    ],
)  # fmt: skip
def test_invalid_setting_is_reported(key, value, message):
    with pytest.raises(PipelineError, match=message):
        config.load(PARAMS_YAML, {key: value})


def test_training_without_labels_and_losses_is_rejected():
    entry = SelfSupervisedFedDifRC.Settings(tdcl_weight=0.0, ndcr_weight=0.0)
    with pytest.raises(PipelineError, match="has nothing to train on .* Set tdcl_weight or ndcr_weight"):
        methods.build(entry, tiny_model(), 0.9, 0.0, 1)


def test_override_of_guidance_applies_to_one_method():
    entries = config.load(PARAMS_YAML, {"methods.fedprox-feddifrc.guidance.temperature": 0.5}).params.methods
    assert methods.guidance_of(entries["fedprox-feddifrc"]).temperature == 0.5
    assert methods.guidance_of(entries["feddifrc"]).temperature == 0.04
    assert methods.guidance_of(entries["fedavg"]) is None
