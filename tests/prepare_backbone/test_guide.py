"""A guide trained on images of one's own: from its folder of images to the refusal of seen images."""

import hashlib
import json
import shutil
import signal
import time

import h5py
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

from pipeline.data.datasets import PreparedDataset
from pipeline.diffusion import frozen_model
from pipeline.errors import ConfigError, FeatureSetError, TrainingDiverged
from pipeline.feature_store import FeatureSet
from pipeline.io.resumable import ResumableStore
from pipeline.settings.params import GuideTraining
from stages.prepare_backbone.training import corpus as corpora
from stages.prepare_backbone.training import learner
from stages.prepare_backbone.training.architecture import SIZES, build, build_tokenizer
from stages.prepare_backbone.training.corpus import Corpus
from stages.prepare_backbone.training.trainer import Machine, Trainer
from stages.train_fl import Samples, simulate
from stages.train_fl.methods import FedDifRC
from tests.conftest import invoke, write_params
from tests.faults import program
from tests.prepare_backbone.guides import QUICK, TINY, settings, write_corpus

CPU = Machine("cpu")


def quick(**changes):
    return GuideTraining.model_validate(QUICK | changes)


def random_corpus(count=6, size=16):
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return Corpus(images, np.arange(count) % 2, ["cat", "dog"], np.empty(0, np.uint64))


def weights(pipe):
    return {
        f"{part}.{name}": tensor
        for part in ("vae", "unet", "text_encoder")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


@pytest.mark.parametrize(("size", "millions"), [("nano", 2.2), ("small", 8), ("base", 39)])
def test_sizes(size, millions):
    with torch.device("meta"):
        pipe = build(SIZES[size], 64, ["a photo of a cat"])
    assert sum(tensor.numel() for tensor in weights(pipe).values()) == pytest.approx(1e6 * millions, rel=0.03)
    assert pipe.unet.config.sample_size == 16 and len(pipe.unet.up_blocks) == 4
    with torch.device("meta"):
        latents = pipe.vae.encode(torch.empty(1, 3, 64, 64)).latent_dist.mean
    assert latents.shape == (1, 4, 16, 16)


def test_words_of_captions_are_one_token_each_and_other_words_letters():
    tokenizer = build_tokenizer(["a photo of a Crème brûlée 7"])
    start, *words, end = tokenizer("A photo of a crème brûlée 7").input_ids
    assert len(set(words)) == len(words) - 1 == 6  # "a" twice
    assert tokenizer.decode(words).strip() == "a photo of a crème brûlée 7"
    assert len(tokenizer("vizz").input_ids) == 2 + len("vizz")
    assert tokenizer("").input_ids == [start, end]


def test_caption_that_is_too_long_is_one_error():
    long = Corpus(np.zeros((2, 16, 16, 3), np.uint8), np.arange(2), ["cat", "x " * 40], np.empty(0, np.uint64))
    with pytest.raises(ConfigError, match="46 tokens, and the model reads 32. Shorten") as error:
        Trainer(long, quick(), CPU)  # 40 words, the four of "a photo of a", start and end
    assert "\n" not in str(error.value)


def test_latents_are_standardised_and_decoded_as_before():
    """The scale moves from the latents into the convolutions around them, so reconstructions stay as they are."""
    made = Trainer(random_corpus(40), quick(), CPU)
    vae = made.pipe.vae.eval().requires_grad_(False)
    pixels = made._images().float() / 127.5 - 1
    before, posterior = vae.decode(vae.encode(pixels).latent_dist.mean).sample, vae.encode(pixels).latent_dist
    made._standardise(made._images())
    after = vae.encode(pixels).latent_dist
    std, mean = torch.std_mean(after.mean, dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(std, torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(vae.decode(after.mean).sample, before, atol=1e-4, rtol=0)
    scale = posterior.mean.std((0, 2, 3))[None, :, None, None]
    torch.testing.assert_close(after.std * scale, posterior.std, rtol=1e-3, atol=1e-6)
    assert made.encode().std((0, 1, 3, 4)).tolist() == pytest.approx([1] * 4, rel=1e-3)


def test_learner_is_adamw_with_warm_up_cosine_clipping_and_average():
    """Against a loop of the formulas, for the loss w * (3, 4): a gradient of norm 5, clipped to (0.6, 0.8)."""
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor([1.0, 2.0]))])
    made = learner.Learner(
        "denoiser", torch.nn.ModuleList([module]), lambda generator: (module[0] * torch.tensor([3.0, 4.0])).sum(),
        steps=40, learning_rate=0.1, ema_decay=0.4, seed=0, graph=False,
    )  # fmt: skip
    weight, average = np.array([1.0, 2.0]), np.array([1.0, 2.0])
    m, v, gradient, losses = np.zeros(2), np.zeros(2), np.array([0.6, 0.8]), []
    for step in range(1, 9):
        losses.append(weight @ [3, 4])
        rate = 0.1 * min(1, step / 2) * (1 + np.cos(np.pi * (step - 1) / 40)) / 2  # 5 % of 40 steps to warm up
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        adam = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.99**step)) + 1e-8)
        weight = weight * (1 - rate * 0.01) - rate * adam
        decay = min(0.4, step / (9 + step))
        average = decay * average + (1 - decay) * weight
        made.advance()
    assert made.mean_loss() == pytest.approx(np.mean(losses), rel=1e-5)
    assert module[0].tolist() == pytest.approx(weight.tolist(), rel=1e-5)
    with made.averaged():
        assert module[0].tolist() == pytest.approx(average.tolist(), rel=1e-5)
    assert module[0].tolist() == pytest.approx(weight.tolist(), rel=1e-5)
    made.finish()
    assert module[0].tolist() == pytest.approx(average.tolist(), rel=1e-5)


def test_denoiser_sees_each_class_with_its_caption_and_some_without(monkeypatch):
    """The embeddings that the UNet gets are those of the images' classes, or of the empty text."""
    made = Trainer(random_corpus(), quick(batch_size=200, empty_caption_rate=0.25, denoiser_steps=1), CPU)
    latents = torch.arange(6.0).view(1, 6, 1, 1, 1).expand(1, 6, 4, 4, 4).contiguous()  # names the image
    seen = {}
    forward = made.pipe.unet.forward

    def spy(noisy, timesteps, embeds, **more):
        seen.update(noisy=noisy, timesteps=timesteps, embeds=embeds)
        return forward(noisy, timesteps, embeds, **more)

    monkeypatch.setattr(made.pipe.unet, "forward", spy)
    texts = made.pipe.tokenizer(["a photo of a cat", "a photo of a dog", ""], padding="max_length", return_tensors="pt")
    expected = made.pipe.text_encoder(texts.input_ids)[0].detach()
    made.train_denoiser(latents)
    text = (seen["embeds"][:, None] - expected).abs().amax((2, 3)).argmin(1)
    early = seen["timesteps"] < 50  # noised so little that the image can be read off
    assert early.sum() == 10  # 200 / 20: one timestep from each part of the schedule
    image = seen["noisy"].mean((1, 2, 3)).round()[early].long()
    assert set((image % 2 - text[early])[text[early] < 2].tolist()) == {0}
    assert 30 <= (text == 2).sum() <= 70  # of 200, at a rate of 0.25


def test_flips_add_the_mirror_images_and_captions_beyond_the_batch_work():
    plain, flipped = (Trainer(random_corpus(), quick(flips=flips), CPU) for flips in (False, True))
    assert plain.encode().shape == (1, 6, 4, 4, 4)
    latents = flipped.encode()
    mirrored = Trainer(
        Corpus(np.ascontiguousarray(random_corpus().images[:, :, ::-1]), *vars_of(random_corpus())), quick(), CPU
    )
    torch.testing.assert_close(latents[1], mirrored.encode()[0], atol=1e-4, rtol=0)
    many = random_corpus()
    names = Corpus(many.images, np.arange(6), [f"class {letter}" for letter in "abcdef"], many.files)
    one = Trainer(names, quick(batch_size=4), CPU)  # seven texts, four images
    one.train()
    assert np.isfinite(list(one.losses.values())).all()


def vars_of(corpus):
    return corpus.labels, corpus.class_names, corpus.files


def test_divergence_is_one_error():
    made = Trainer(random_corpus(), quick(autoencoder_learning_rate=1e30), CPU)
    with pytest.raises(
        TrainingDiverged, match="autoencoder's training diverged .* Lower prepare_backbone.training.auto"
    ):
        made.train_autoencoder()


def test_lack_of_memory_is_one_error():
    message = str(learner.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"), 512))
    assert "batch_size is 512). Set it to 256" in message and "\n" not in message
    assert learner.out_of_memory(RuntimeError("shapes differ"), 512) is None


class Interrupting(ResumableStore):
    """A store after whose n-th checkpoint the process is interrupted."""

    left = 0

    def save(self, *arguments):
        super().save(*arguments)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_interrupted_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    """Interrupted within the autoencoder's three steps, at their end, and within the denoiser's."""
    monkeypatch.setitem(SIZES, "nano", TINY)
    whole = Trainer(random_corpus(), quick(), CPU)
    whole.train()
    (tmp_path / "autoencoder.safetensors").write_bytes(b"damaged")  # counts as missing, with a warning
    steps = []
    advance = learner.Learner.advance
    monkeypatch.setattr(learner.Learner, "advance", lambda self: (steps.append(self.name), advance(self)))
    for count in (1, 2, 2):
        store = Interrupting(tmp_path)
        store.left = count
        with pytest.raises(KeyboardInterrupt):
            Trainer(random_corpus(), quick(), CPU, store).train()
    resumed = Trainer(random_corpus(), quick(), CPU, ResumableStore(tmp_path))
    resumed.train()
    assert steps == 3 * ["autoencoder"] + 3 * ["denoiser"]  # none twice
    assert resumed.losses == whole.losses
    for name, tensor in weights(whole.pipe).items():
        assert torch.equal(tensor, weights(resumed.pipe)[name]), name


def test_killed_command_resumes_with_identical_bytes(tmp_path):
    """kill -9 in each phase, as soon as it has a checkpoint; the command is then given again."""
    write_corpus(tmp_path / "corpus")
    changes = settings(tmp_path / "corpus") | {"runtime.guide_checkpoint_minutes": 0.0}
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    for root in (whole, killed):
        root.mkdir()
        write_params(root, changes)
    program.succeed(whole, "prepare-backbone")
    for phase in ("autoencoder", "denoiser"):
        command = program.start(killed, "prepare-backbone")
        while command.process.is_alive() and not list(killed.glob(f".pipeline/guides/*/{phase}.safetensors")):
            time.sleep(0.002)
        command.process.kill()
        assert command.end() == -signal.SIGKILL, command.output
    assert "denoiser: resuming after step" in program.succeed(killed, "prepare-backbone")
    for part in ("models", "data"):
        assert program.contents(whole / part) == program.contents(killed / part)
    assert not list((killed / ".pipeline" / "guides").iterdir())


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """A project with a guide, whose corpus is in the folder."""
    root = tmp_path_factory.mktemp("guided")
    write_corpus(root / "corpus", per_class=4)
    write_params(root, settings(root / "corpus"))
    result = invoke(root, "prepare-backbone")
    assert result.exit_code == 0, result.output
    return root


def test_manifest_says_what_the_guide_was_trained_on(guided):
    manifest = frozen_model.read_checked(guided / "data" / "backbones" / "mine.json", guided / "models" / "mine")
    training = manifest.training
    assert (manifest.source, training.corpus) == ("train", "corpus")
    assert training.images == {"blue box": 4, "red ball": 4}
    assert training.settings == quick().model_dump()
    assert set(training.losses) == {"autoencoder", "denoiser"}
    assert {kind: len(found) for kind, found in training.hashes.items()} == {"files": 8, "pixels": 8}
    with Image.open(guided / "analysis" / "mine-samples.png") as picture:
        assert picture.size == (2 * 64, 64)  # two classes, side by side, enlarged from 16 pixels


def test_guide_is_loaded_as_any_other_model_and_its_copy_keeps_the_record(guided, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(guided / "models" / "mine", use_safetensors=True)
    assert len(pipe.unet.up_blocks) == 4
    with safe_open(guided / "models" / "mine" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as unet:
        assert {unet.get_tensor(key).dtype for key in unet.keys()} == {torch.float16}
    write_params(
        tmp_path, {"prepare_backbone.source": str(guided / "models" / "mine"), "prepare_backbone.name": "copy"}
    )
    assert invoke(tmp_path, "prepare-backbone").exit_code == 0
    manifests = [json.loads((root / "data" / "backbones" / f"{name}.json").read_text())
                 for root, name in ((guided, "mine"), (tmp_path, "copy"))]  # fmt: skip
    assert manifests[0]["training"] == manifests[1]["training"]
    assert manifests[0]["files"] == manifests[1]["files"]


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff" * 40])
def test_damaged_record_of_a_copy_is_one_error(guided, tmp_path, damage):
    shutil.copytree(guided / "models" / "mine", tmp_path / "copy")
    (tmp_path / "copy" / "guide_training.json").write_bytes(damage)
    write_params(tmp_path, {"prepare_backbone.source": str(tmp_path / "copy"), "prepare_backbone.name": "copy"})
    result = invoke(tmp_path, "prepare-backbone")
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert "guide_training.json does not say what the model was trained on" in result.output


def test_finished_guide_is_not_trained_again(guided, tmp_path):
    shutil.copytree(guided, tmp_path / "p", dirs_exist_ok=True)
    root = tmp_path / "p"
    shutil.rmtree(root / "data")  # as DVC does before it runs the stage
    assert "complete already" in invoke(root, "prepare-backbone").output
    assert program.contents(root / "data") == program.contents(guided / "data")
    (root / "models" / "mine" / "unet" / "config.json").write_text("{}")  # damaged: made again
    assert "complete already" not in invoke(root, "prepare-backbone").output
    assert program.contents(root / "data") == program.contents(guided / "data")


def prepared(guided, root, seen, image_size, encode=None):
    """A project with the guide, and a data set of 10 images per class of which `seen` per class are of the corpus."""
    for name in ("models", "data"):
        shutil.copytree(guided / name, root / name)
    shutil.copytree(guided / "corpus", root / "images")
    for folder in (root / "images").iterdir():
        for file in sorted(folder.iterdir())[seen:]:
            file.unlink()
        for file in folder.iterdir():
            if encode:
                Image.open(file).save(file.with_suffix(f".{encode}"), quality=50)
                file.unlink()
    write_corpus(root / "new", 10 - seen, seed=1)
    for file in sorted((root / "new").rglob("*.png")):
        file.rename(root / "images" / file.parent.name / f"new-{file.name}")
    write_params(root, settings(guided / "corpus") | {
        "prepare_data.name": "pets", "prepare_data.source": "folder", "prepare_data.path": str(root / "images"),
        "prepare_data.image_size": image_size, "prepare_data.train_subset": None, "extract_features.image_size": 16,
        "extract_features.basis_images": 8, "train_fl.num_clients": 2, "train_fl.num_rounds": 1,
    })  # fmt: skip
    for command in ("prepare-data", "extract-features"):
        result = invoke(root, command)
        assert result.exit_code == 0, result.output
    return json.loads((root / "data" / "features" / "pets-mine-t300" / "manifest.json").read_text())


TRAIN = ("train-fl", "--method", "feddifrc", "--partition", "iid", "--seed", "0")


# The same files at the corpus's size and at another; the same pixels in files of another format; pixels that are not
# quite the same.
@pytest.mark.parametrize(
    ("size", "encode", "found"), [(16, None, 6), (12, None, 6), (16, "bmp", 6), (12, "bmp", 0), (16, "jpg", 0)]
)
def test_images_that_the_guide_has_seen_are_counted(guided, tmp_path, size, encode, found):
    assert prepared(guided, tmp_path, 3, size, encode)["provenance"]["seen_images"] == found
    if encode:
        return
    before = program.contents(tmp_path)
    images = PreparedDataset(tmp_path / "data" / "datasets" / "pets").load("train")
    features = FeatureSet(tmp_path / "data" / "features" / "pets-mine-t300")
    samples = Samples(images.images, images.labels, features, np.arange(len(images)))
    with pytest.raises(FeatureSetError, match="trained on 6 of the data set's images"):
        simulate(FedDifRC, [samples], samples, num_rounds=1)
    result = invoke(tmp_path, *TRAIN)
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert "trained on 6 of the data set's images" in result.output
    assert "allow_seen_images to true" in result.output
    result = invoke(tmp_path, "synthesize", "--images-per-class", "1")
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert "mine was trained on 6 of the images of" in result.output and "may generate them again" in result.output
    assert program.contents(tmp_path) == before  # refused before any work
    assert invoke(tmp_path, "train-fl", "--method", "fedavg", *TRAIN[3:]).exit_code == 0  # which is not guided
    assert invoke(tmp_path, *TRAIN, "--allow-seen-images", "true").exit_code == 0
    runs = [json.loads((tmp_path / "results" / f"{name}-iid" / "s0" / "config.json").read_text())
            for name in ("feddifrc", "fedavg")]  # fmt: skip
    assert [run.get("seen_images") for run in runs] == [6, None]


@pytest.mark.parametrize(
    ("hashes", "message"),
    [
        (np.zeros(3, np.uint64), "does not hold one file hash per image"),
        (np.zeros(20), "does not hold one file hash per image"),
        (None, "is truncated or corrupt"),  # chunked, so that reading it may run a filter
    ],
)
def test_damaged_file_hashes_are_one_error(guided, tmp_path, hashes, message):
    prepared(guided, tmp_path, 0, 16)
    with h5py.File(tmp_path / "data" / "datasets" / "pets" / "train.h5", "r+") as h5:
        del h5["files"]
        if hashes is None:
            h5.create_dataset("files", data=np.zeros(len(h5["labels"]), np.uint64), chunks=(2,), compression="gzip")
        else:
            h5["files"] = hashes
    result = invoke(tmp_path, "extract-features", "--timestep", "100")
    assert result.exit_code == 1 and result.output.count("\n") == 1, result.output
    assert message in result.output


def test_new_images_are_welcome(guided, tmp_path):
    assert prepared(guided, tmp_path, 0, 16)["provenance"]["seen_images"] == 0
    assert invoke(tmp_path, *TRAIN).exit_code == 0


def test_file_hashes_follow_their_images(guided, tmp_path):
    """Also of a subset in a random order, in which broken images are left out."""
    root = tmp_path
    write_corpus(root / "images", 6)
    (root / "images" / "red_ball" / "broken.png").write_bytes(b"\x89PNG broken")
    write_params(root, {
        "prepare_data.name": "pets", "prepare_data.source": "folder", "prepare_data.path": str(root / "images"),
        "prepare_data.image_size": 20, "prepare_data.train_subset": 7, "prepare_data.broken_images": "skip",
    })  # fmt: skip
    assert invoke(root, "prepare-data").exit_code == 0
    dataset = PreparedDataset(root / "data" / "datasets" / "pets")
    by_pixels = {np.asarray(Image.open(file)).tobytes(): file for file in sorted((root / "images").rglob("[0-9].png"))}
    for split in ("train", "test"):
        hashes = dataset.file_hashes(split)
        for image, found in zip(dataset.load(split).images, hashes, strict=True):
            file = by_pixels[image.tobytes()]
            assert f"{found:016x}" == hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def no_corpus(folder):
    return folder / "missing"


def empty(folder):
    (folder / "cat").mkdir(parents=True)
    return folder


def one_class(folder):
    return write_corpus(folder, classes=("cat",))


def same_name(folder):
    return write_corpus(folder, classes=("red_ball", "red ball"))


def broken(folder):
    write_corpus(folder)
    for number in range(7):
        (folder / "red_ball" / f"b{number}.png").write_bytes(b"not an image")
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (no_corpus, "missing is not a folder. Set prepare_backbone.corpus to a tree of <class>/<image> folders"),
        (empty, "has no images in its class folders (cat). Add images."),
        (one_class, "has images of one class only (cat)"),
        (same_name, "Two class folders or labels have the same name ('red ball'"),
        (broken, "7 images cannot be read: red_ball/b0.png (is not of a known image format)"),
    ],
)
def test_unusable_corpus_is_one_error(tmp_path, make, says):
    write_params(tmp_path, settings(make(tmp_path / "corpus")))
    result = invoke(tmp_path, "prepare-backbone")
    assert result.exit_code == 1 and result.output.count("\n") == 1 and result.output.startswith("Error: ")
    assert says in result.output
    if make is broken:
        assert "and 2 more, all listed in" in result.output and "Repair or remove them." in result.output
        listing = tmp_path / ".pipeline" / "broken-images-mine-corpus.txt"
        assert listing.read_text().count("\n") == 7
    assert not (tmp_path / "models").exists()


def test_source_train_needs_a_corpus_and_others_do_not_use_it(tmp_path):
    write_params(tmp_path, {"prepare_backbone.source": "train"})
    result = invoke(tmp_path, "prepare-backbone")
    assert result.exit_code == 1 and "requires prepare_backbone.corpus (it is data/corpus/none)" in result.output
    write_params(tmp_path, {"prepare_backbone.corpus": "photos"})
    assert "prepare_backbone.corpus is not used" in invoke(tmp_path, "prepare-backbone").output


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("size", "huge", "prepare_backbone.training.size = 'huge': input should be 'nano', 'small' or 'base'"),
        ("image-size", "30", "prepare_backbone.training.image_size = 30: input should be a multiple of 8"),
        ("caption", "a photo", "prepare_backbone.training.caption = 'a photo'"),
        ("empty-caption-rate", "1", "prepare_backbone.training.empty_caption_rate = 1"),
    ],
)
def test_flags_set_the_keys_of_the_training(tmp_path, flag, value, says):
    write_params(tmp_path, {})
    result = invoke(tmp_path, "prepare-backbone", f"--training-{flag}", value)
    assert result.exit_code == 1 and result.output.startswith(f"Error: command line: {says}")


def test_unknown_key_of_the_training_is_answered_with_its_neighbour(tmp_path):
    write_params(tmp_path, {"prepare_backbone.training": {"batchsize": 3}})
    assert "prepare_backbone.training.batchsize is not a known key; did you mean batch_size?" in invoke(
        tmp_path, "prepare-backbone"
    ).output  # fmt: skip


def test_help_documents_the_training():
    text = " ".join(invoke(corpora.Path("."), "prepare-backbone", "--help").output.split())
    assert "--training-denoiser-steps VALUE" in text and "default 20000" in text


def test_corpus_with_split_folders_gives_its_training_images(tmp_path):
    for split, seed in (("train", 0), ("test", 1)):
        write_corpus(tmp_path / "c" / split, 2, seed=seed)
    found = corpora.read(tmp_path / "c", 20, tmp_path / "broken.txt")
    assert found.class_names == ["blue box", "red ball"] and found.labels.tolist() == [0, 0, 1, 1]
    first = np.asarray(Image.open(tmp_path / "c" / "train" / "blue_box" / "0.png"))
    assert np.array_equal(found.images[0], first)


def test_memory_is_checked_before_images_are_read(tmp_path, monkeypatch):
    write_corpus(tmp_path / "c")
    monkeypatch.setattr(corpora.memory, "available", lambda: 47_000)  # of which the 28,800 bytes may fill 0.6
    with pytest.raises(corpora.PipelineError, match="6 images of 40 pixels need .* GB of memory, and .* GB are free"):
        corpora.read(tmp_path / "c", 40, tmp_path / "broken.txt")


def test_trained_guide_is_not_replaced_by_another_model(guided, tmp_path):
    shutil.copytree(guided / "models", tmp_path / "models")
    before = program.contents(tmp_path / "models")
    write_params(tmp_path, {"prepare_backbone.name": "mine"})  # the flag for the source was forgotten
    result = invoke(tmp_path, "prepare-backbone")
    assert result.exit_code == 1 and "holds a guide that was trained here" in result.output
    assert program.contents(tmp_path / "models") == before


def test_guide_needs_a_name_of_its_own(guided, tmp_path):
    write_params(tmp_path, settings(guided / "corpus") | {"prepare_backbone.name": "tiny-sd"})
    result = invoke(tmp_path, "prepare-backbone")
    assert result.exit_code == 1 and "Set another name for it" in result.output
