"""The conversions in docs/models.md, and PixArt's published tokenizer."""

import json
import re

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from pipeline.diffusion import backbones
from pipeline.errors import PipelineError
from stages.prepare_backbone.directory import Directory
from stages.prepare_backbone.selection import select
from tests.conftest import REPOSITORY
from tests.extract_features import tiny_models
from tests.prepare_backbone.hub_server import COMMIT

SNIPPET = re.search(r"```python\n(.*?)```", (REPOSITORY / "docs" / "models.md").read_text(), re.DOTALL)[1]


def test_conversion_of_dit_keeps_its_classes(tmp_path, hub):
    published = tiny_models.dit(hub.root / "org" / "dit")
    index = json.loads((published / "model_index.json").read_text()) | {"_class_name": "DiTPipeline"}
    (published / "model_index.json").write_text(json.dumps(index))
    for part in ("transformer", "vae"):
        weights = published / part / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    with pytest.raises(PipelineError, match="weights in transformer/, but diffusion_pytorch_model.bin"):
        select(Directory(published), "auto", prefer_fp16=False)
    code = SNIPPET.replace('"dit-converted"', repr(str(tmp_path / "converted")))
    code = code.replace("facebook/DiT-XL-2-256", "org/dit").replace("<commit>", COMMIT)
    exec(compile(code, "docs/models.md", "exec"), {})
    assert select(Directory(tmp_path / "converted"), "auto", False).family == "DiTTransformer2DModel"
    backbone = backbones.load(tmp_path / "converted", "auto", "cpu", torch.float32)
    assert backbone.encode_prompts(["goldfish", "Tinca tinca", ""]).tensors["class_labels"].tolist() == [1, 0, 3]
    with pytest.raises(PipelineError, match="is conditioned on 3 classes, and 'a dog' is not one of their names"):
        backbone.encode_prompts(["a dog"])
    index = tmp_path / "converted" / "model_index.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "id2label"}))
    with pytest.raises(PipelineError, match="is a DiT without class names"):
        select(Directory(tmp_path / "converted"), "auto", prefer_fp16=False)


def test_published_pixart_has_only_spiece_model(tmp_path):
    path = tiny_models.pixart(tmp_path / "m")
    for file in (path / "tokenizer").glob("tokenizer.json"):
        file.unlink()
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a photo of a cat\na photo of a dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(path / "tokenizer" / "spiece"), vocab_size=24, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (path / "tokenizer" / "spiece.vocab").unlink()
    settings = json.loads((path / "tokenizer" / "tokenizer_config.json").read_text()) | {"extra_ids": 0}
    (path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "tokenizer/spiece.model" in select(Directory(path), "auto", prefer_fp16=False).files
    states = backbones.load(path, "auto", "cpu", torch.float32).encode_prompts(["a cat", "a dog"])
    assert not torch.equal(*states.similarity)
