"""Each model family: layers equal those of the full denoiser bit for bit; noise and prompts by hand."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines import DiffusionPipeline, FluxPipeline, SanaPipeline
from safetensors.torch import load_file, save_file

from pipeline.diffusion import backbones
from pipeline.diffusion.backbones import text
from pipeline.errors import PipelineError
from tests.extract_features import tiny_models
from tests.extract_features.tiny_models import FAMILIES

PROMPTS = {"dit": ["goldfish", "tench", ""]}
TEXTS = ["a photo of a cat", "a photo of a dog", ""]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: build(root / name) for name, build in FAMILIES.items()}


class _Done(Exception):
    pass


def oracle(path, layers, noisy, timestep, conditioning):
    """Return maps of the unmodified denoiser; an exception ends its forward pass after the last layer."""
    backbone = backbones.load(path, layers, "cpu", torch.float32)
    denoiser = backbone.model_class.from_pretrained(path / backbone.component).eval()
    denoiser.to(memory_format=torch.channels_last)
    seen = {}

    def hook(layer, last):
        def keep(module, inputs, output):
            seen[layer] = output[1] if isinstance(output, tuple) else output
            if last:
                raise _Done

        return keep

    for layer in layers:
        denoiser.get_submodule(layer).register_forward_hook(hook(layer, layer == layers[-1]))
    backbone._model = denoiser
    with torch.no_grad(), pytest.raises(_Done):
        backbone._maps.of_layer = {}
        backbone._denoise(noisy.to(memory_format=torch.channels_last), timestep, conditioning.tensors)
    return seen


@pytest.mark.parametrize("latents", [32, 28, 7])
@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_unet_without_its_tail_gives_identical_maps(models, latents, last):
    layers = [f"up_blocks.{block}" for block in range(last + 1)]
    backbone = backbones.load(models["sd"], layers, "cpu", torch.float32)
    conditioning = backbone.encode_prompts(TEXTS[:2])
    noisy = torch.randn(2, 4, latents, latents, generator=torch.Generator().manual_seed(0))
    expected = oracle(models["sd"], layers, noisy, 300, conditioning)
    for layer, maps in backbone.features(noisy, 300, conditioning).items():
        assert torch.equal(maps, expected[layer]), layer


@pytest.mark.parametrize("latents", [32, 28, 7])
@pytest.mark.parametrize("last", [0, 2])
def test_xl_without_its_tail_gives_identical_maps(models, latents, last):
    layers = [f"up_blocks.{block}" for block in range(last + 1)]
    backbone = backbones.load(models["sdxl"], layers, "cpu", torch.float32)
    conditioning = backbone.encode_prompts(TEXTS[:2])
    noisy = torch.randn(2, 4, latents, latents, generator=torch.Generator().manual_seed(0))
    expected = oracle(models["sdxl"], layers, noisy, 300, conditioning)
    for layer, maps in backbone.features(noisy, 300, conditioning).items():
        assert torch.equal(maps, expected[layer]), layer


@pytest.mark.parametrize("latents", [32, 28, 14])
@pytest.mark.parametrize("name", ["pixart", "dit", "sd3", "sana", "flux", "flux single"])
def test_transformer_without_its_tail_gives_identical_maps(models, name, latents):
    layers = {
        "flux": ["transformer_blocks.0", "transformer_blocks.2"],
        "flux single": ["transformer_blocks.1", "single_transformer_blocks.1"],
    }.get(name, ["transformer_blocks.1", "transformer_blocks.3"])
    name = name.split()[0]
    backbone = backbones.load(models[name], layers, "cpu", torch.float32)
    conditioning = backbone.encode_prompts(PROMPTS.get(name, TEXTS)[:2])
    channels = backbone._vae.config.latent_channels
    noisy = torch.randn(2, channels, latents, latents, generator=torch.Generator().manual_seed(0))
    expected = oracle(models[name], layers, noisy, 300, conditioning)
    for layer, maps in backbone.features(noisy, 300, conditioning).items():
        tokens = expected[layer]
        side = latents if name == "sana" else latents // 2
        assert maps.shape == (2, 24, side, side)
        for row, column in [(0, 0), (0, side - 1), (side - 1, 0), (3, 5)]:
            assert torch.equal(maps[:, :, row, column], tokens[:, row * side + column])


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_and_channels_are_read_from_the_configuration(models, name):
    expected = {
        "sd": {"up_blocks.1": 24, "up_blocks.2": 16, "up_blocks.3": 16},
        "sdxl": {"up_blocks.0": 32, "up_blocks.1": 24, "up_blocks.2": 16},
        "flux": {"transformer_blocks.1": 24, "transformer_blocks.2": 24, "single_transformer_blocks.0": 24},
    }.get(name, {f"transformer_blocks.{block}": 24 for block in (1, 2, 3)})  # ends of 2, 3 and 4 of 6 blocks
    assert backbones.layer_channels(models[name], "auto") == expected
    backbone = backbones.load(models[name], "auto", "cpu", torch.float32)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    latents = backbone.encode_images(images, 64)
    assert latents.shape[-2:] == (8, 8)
    conditioning = backbone.encode_prompts(PROMPTS.get(name, TEXTS)[:1])
    found = {layer: maps.shape[1] for layer, maps in backbone.features(latents, 300, conditioning).items()}
    assert found == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_change_the_features(models, name):
    backbone = backbones.load(models[name], "auto", "cpu", torch.float32)
    conditioning = backbone.encode_prompts(PROMPTS.get(name, TEXTS))
    assert conditioning.similarity.shape[0] == 3
    channels = backbone._vae.config.latent_channels
    noisy = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    for maps in backbone.features(noisy, 300, conditioning).values():
        assert not torch.allclose(maps[0], maps[1], atol=1e-6)
        assert not torch.allclose(maps[1], maps[2], atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_follows_the_models_schedule(tmp_path, prediction_type):
    path = tiny_models.sd(tmp_path / "m", DDIMScheduler, prediction_type)
    backbone = backbones.load(path, "auto", "cpu", torch.float32)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # "scaled linear"
    alpha_bar = np.cumprod(1 - betas)[300]
    latents, noise = torch.full((1, 4, 2, 2), 2.0), torch.full((1, 4, 2, 2), -1.0)
    expected = np.sqrt(alpha_bar) * 2 - np.sqrt(1 - alpha_bar)
    assert backbone.add_noise(latents, noise, 300).unique().item() == pytest.approx(expected, rel=1e-5)


def test_v_prediction_gives_the_same_maps_as_epsilon_prediction(tmp_path):
    found = []
    for prediction_type in ("epsilon", "v_prediction"):
        path = tiny_models.sd(tmp_path / prediction_type, DDIMScheduler, prediction_type)
        backbone = backbones.load(path, "auto", "cpu", torch.float32)
        noisy = torch.ones(1, 4, 8, 8)
        found.append(backbone.features(noisy, 300, backbone.encode_prompts(["x"]))["up_blocks.3"])
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["sd3", "flux", "sana"])
def test_flow_matching_mixes_linearly(models, name):
    backbone = backbones.load(models[name], "auto", "cpu", torch.float32)
    latents, noise = torch.full((1, 16, 2, 2), 2.0), torch.full((1, 16, 2, 2), -1.0)
    assert backbone.add_noise(latents, noise, 300).unique().item() == pytest.approx(0.7 * 2 - 0.3)
    schedule = FlowMatchEulerDiscreteScheduler(shift=1.0)  # unshifted, its 300 is the same mixture
    same = schedule.scale_noise(latents, torch.tensor([300.0]), noise)
    assert same.unique().item() == pytest.approx(0.7 * 2 - 0.3)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_latents_are_the_scaled_mean(models, name):
    backbone = backbones.load(models[name], "auto", "cpu", torch.float32)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    reference = AutoencoderKL.from_pretrained(models[name] / "vae").eval()
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2) / 127.5 - 1).float()
    with torch.no_grad():
        mean = reference.encode(pixels).latent_dist.mean
    shift, scale = {"sd": (0, 0.18215), "sd3": (0.0609, 1.5305)}[name]
    torch.testing.assert_close(backbone.encode_images(images, 64), (mean - shift) * scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_text_is_encoded_as_the_models_own_pipeline_does(models, name):
    import diffusers

    classes = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline"}
    pipeline_class: type[DiffusionPipeline] = getattr(diffusers, classes[name])
    extra = dict(safety_checker=None, feature_extractor=None) if name == "sd" else {}
    pipe = pipeline_class.from_pretrained(models[name], **extra)
    if name == "sd3":
        states, _, pooled, _ = pipe.encode_prompt(TEXTS, None, None, do_classifier_free_guidance=False)
    elif name == "sdxl":
        states, _, pooled, _ = pipe.encode_prompt(TEXTS, do_classifier_free_guidance=False)
    else:
        states, _ = pipe.encode_prompt(TEXTS, "cpu", 1, False)
    got = backbones.load(models[name], "auto", "cpu", torch.float32).encode_prompts(TEXTS)
    torch.testing.assert_close(got.tensors["encoder_hidden_states"], states)
    if name != "sd":
        torch.testing.assert_close(got.tensors.get("text_embeds", got.tensors.get("pooled_projections")), pooled)


def test_sd3_works_without_t5(tmp_path):
    backbone = backbones.load(tiny_models.sd3(tmp_path / "m", t5=False), "auto", "cpu", torch.float32)
    states = backbone.encode_prompts(["a"]).tensors["encoder_hidden_states"]
    assert states.shape == (1, 48 + 256, 64) and not states[:, 48:].any()


def test_pixart_of_1024_pixels_receives_sizes(tmp_path):
    path = tiny_models.pixart(tmp_path / "m", sample_size=128)
    backbone = backbones.load(path, ["transformer_blocks.0"], "cpu", torch.float32)
    assert backbone._model.use_additional_conditions
    backbone.features(torch.zeros(2, 4, 8, 8), 10, backbone.encode_prompts(["a", "b"]))


class Counted:
    """A text encoder of two numbers per text: its length as the state, its first characters as the mask."""

    def __init__(self):
        self.tokens = self
        self.batches = []

    def __call__(self, prompts):
        self.batches.append(len(prompts))
        mask = torch.tensor([[int(text[0]), int(text[1])] for text in prompts])
        return torch.tensor([[float(len(text))] for text in prompts]), mask

    def warn_if_truncated(self):
        pass


def test_averaged_templates_and_masks():
    encoder = Counted()
    found = text.encode(encoder, ["10", "0111", "10abc"], [2, 1], lambda states, mask: {"states": states, "mask": mask})
    assert found["states"].tolist() == [[3.0], [5.0]]  # (2 + 4) / 2 characters, and 5
    assert found["mask"].tolist() == [[1, 1], [1, 0]]


def test_groups_larger_than_a_batch_are_averaged_over_batches():
    encoder = Counted()
    texts = ["0" * (2 + n) for n in range(100)]
    found = text.encode(encoder, texts, [50, 1, 49], lambda states, mask: {"states": states.half()})
    assert encoder.batches == [32, 32, 32, 4]
    assert found["states"].dtype == torch.float16
    # lengths 2 to 51, 52, and 53 to 101
    assert found["states"].tolist() == [[26.5], [52.0], [77.0]]


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3"])
def test_averaging_while_encoding_equals_averaging_afterwards(models, name):
    backbone = backbones.load(models[name], "auto", "cpu", torch.bfloat16)
    texts = [f"photo {number} of it" for number in range(40)]
    single, grouped = backbone.encode_prompts(texts), backbone.encode_prompts(texts, [33, 1, 6])
    for tensor, means in zip(single.tensors.values(), grouped.tensors.values(), strict=True):
        for row, part in enumerate((tensor[:33], tensor[33:34], tensor[34:])):
            expected = part.float().mean(0).to(part.dtype) if part.is_floating_point() else part.amax(0)
            assert torch.equal(means[row], expected)
    torch.testing.assert_close(grouped.similarity[0], single.similarity[:33].mean(0))


@pytest.mark.parametrize(
    ("name", "window", "parts"),
    [("sd", 48, ["text_encoder"]), ("sdxl", 48, ["text_encoder", "text_encoder_2"]), ("pixart", 120, ["text_encoder"])],
)
def test_cut_prompts_are_warned_about(models, name, window, parts, caplog):
    text.warn_once.cache_clear()
    fits = "a" * (window - 4) if name != "pixart" else "a" * (window - 2)  # one token a letter, and those at the ends
    backbone = backbones.load(models[name], "auto", "cpu", torch.float32)
    backbone.encode_prompts(["a", "b"])
    assert not caplog.records
    backbone.encode_prompts(["a", "b", fits + "aaaaaaaaxyz"])
    assert len(caplog.messages) == len(parts)
    for part, message in zip(parts, caplog.messages, strict=True):
        assert message.startswith(f"1 of 3 prompts are longer than the {window} tokens that {part} reads")
        assert "xyz" in message and "loses" in message


class _TooLarge(torch.nn.Linear):
    """Fits on the CPU alone; the test uses "meta" as the GPU."""

    def to(self, device, dtype=None):
        if device != "cpu":
            raise torch.OutOfMemoryError("no memory")
        return super().to(device, dtype)


def test_a_text_encoder_that_does_not_fit_beside_the_denoiser_runs_on_the_cpu(caplog):
    encoder, device = text.placed(_TooLarge(2, 2), "meta", torch.bfloat16)
    assert device == "cpu" and encoder.weight.device.type == "cpu" and encoder.weight.dtype == torch.bfloat16
    assert "_TooLarge does not fit on meta beside the denoiser. Encoding prompts on the CPU." in caplog.text


def test_a_class_conditional_model_takes_one_class_per_prompt(models):
    backbone = backbones.load(models["dit"], "auto", "cpu", torch.float32)
    assert backbone.encode_prompts(["tench", "Tinca tinca", "cock"], [2, 1]).tensors["class_labels"].tolist() == [0, 2]
    with pytest.raises(PipelineError, match="a prompt's texts name several \\('tench', 'cock'\\)"):
        backbone.encode_prompts(["tench", "cock"], [2])


@pytest.mark.parametrize("part", ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"])
def test_weights_that_lack_a_tensor_are_rejected(models, tmp_path, part):
    path = tmp_path / "m"
    shutil.copytree(models["sd"], path)
    file = path / f"{part}.safetensors"
    tensors = load_file(file)
    lacking = next(name for name in sorted(tensors) if name.endswith("weight"))
    del tensors[lacking]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(PipelineError, match="lack 1 of the tensors of a .* Get the complete model") as error:
        backbones.load(path, "auto", "cpu", torch.float32).encode_prompts(["a"])
    assert lacking in str(error.value)


def test_wrong_layers_and_models_are_rejected(models, tmp_path):
    with pytest.raises(PipelineError, match=r"names up_blocks.4, but sd has up_blocks.0 to up_blocks.3"):
        backbones.layer_channels(models["sd"], ["up_blocks.4"])
    with pytest.raises(PipelineError, match="patches of 2 do not fill"):
        backbone = backbones.load(models["sd3"], "auto", "cpu", torch.float32)
        backbone.features(torch.zeros(1, 16, 7, 7), 300, backbone.encode_prompts(["a"]))
    with pytest.raises(PipelineError, match="'a dog' is not one of their names"):
        backbones.load(models["dit"], "auto", "cpu", torch.float32).encode_prompts(["a dog"])
    (tmp_path / "model_index.json").write_text('{"transformer": ["diffusers", "QwenImageTransformer2DModel"]}')
    with pytest.raises(PipelineError, match="has an unsupported denoiser .QwenImageTransformer2DModel"):
        backbones.family(tmp_path)


def inputs_of(model, run):
    """Return the tensors of the first call of a model during `run`, by argument; the first one is "first"."""
    seen = {}

    def keep(module, args, kwargs):
        if not seen:
            seen.update({name: value for name, value in kwargs.items() if torch.is_tensor(value)})
            seen["first"] = args[0] if args else seen.pop("hidden_states")

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    run()
    handle.remove()
    return seen


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # of Sana's scheduler
@pytest.mark.parametrize("name", ["flux", "schnell", "sana"])
def test_transformer_gets_the_inputs_that_the_published_pipeline_gives_it(models, tmp_path, name):
    path = tiny_models.flux(tmp_path / "m", guidance=False) if name == "schnell" else models[name]
    kind = SanaPipeline if name == "sana" else FluxPipeline
    side = 64  # pixels
    own = {"complex_human_instruction": None, "guidance_scale": 1.0, "use_resolution_binning": False}
    own = own if name == "sana" else {"max_sequence_length": 256 if name == "schnell" else 512}
    pipe = kind.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    backbone = backbones.load(path, "auto", "cpu", torch.float32)
    channels, height, width = backbone.latent_shape(side)
    noisy = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    latents = noisy if name == "sana" else kind._pack_latents(noisy, 1, channels, height, width)
    size = {"height": side, "width": side, "num_inference_steps": 1, "latents": latents, "output_type": "latent"}
    wanted = inputs_of(pipe.transformer, lambda: pipe("a photo of a cat", **size, **own))
    timestep = round(wanted["timestep"].item() * (1 if name == "sana" else 1000))
    conditioning = backbone.encode_prompts(["a photo of a cat"])
    found = inputs_of(backbone._model, lambda: backbone.features(noisy, timestep, conditioning))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.allclose(found[key].float(), value.float(), atol=1e-5), key
