"""LAM as an ordinary model of sentence-transformers: load with and without lalm, encode, train, save."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from lalm import LamConfig, LamModel
from tests.hub_server import client_environment
from tests.training.sts.tiny_models import SPECIAL, WORDS, sentence_transformer, sentences, student

pytestmark = pytest.mark.slow

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "lam-minilm-l6"
TEXTS = ["", "a dog runs", "Собака бежит 犬が走る", *sentences(9, seed=3, longest=40), "the red house " * 15]

WITHOUT_LALM = """
import json, sys
sys.modules["lalm"] = None
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer
folder, texts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = SentenceTransformer(folder, device="cpu", trust_remote_code=True)
assert type(model[0].auto_model).__module__.startswith("transformers_modules."), type(model[0].auto_model)
save_file({"vectors": model.encode(texts)}, out)
model.save(out + ".again")
"""


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return student()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lam") / "saved"
    model.save(str(path))
    return path


def test_it_loads_without_a_flag_where_lalm_is_imported(model, folder):
    loaded = SentenceTransformer(str(folder), device="cpu")
    assert isinstance(loaded[0].auto_model, LamModel)
    np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))


def encode_without_lalm(folder: Path | str, scratch: Path, **environment: str) -> np.ndarray:
    out = scratch / "vectors"
    environment = os.environ | (environment or {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"})
    command = [sys.executable, "-c", WITHOUT_LALM, str(folder), json.dumps(TEXTS), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=scratch, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(out)["vectors"]


def test_it_loads_without_lalm_by_its_own_code_and_saves_it_again(model, folder, tmp_path):
    np.testing.assert_allclose(encode_without_lalm(folder, tmp_path), model.encode(TEXTS), atol=1e-6)
    again = tmp_path / "vectors.again"
    assert (again / "modeling_lam.py").is_file()
    loaded = SentenceTransformer(str(again), device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_the_committed_checkpoint_loads_without_lalm(tmp_path):
    ours = SentenceTransformer(str(CHECKPOINT), device="cpu")
    assert {weight.dtype for weight in ours.parameters()} == {torch.float32}
    np.testing.assert_allclose(encode_without_lalm(CHECKPOINT, tmp_path), ours.encode(TEXTS), atol=1e-5)


def test_texts_of_many_lengths_are_encoded_as_if_alone(model):
    together = model.encode(TEXTS, batch_size=len(TEXTS))
    alone = np.stack([model.encode(text) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    similarity = model.similarity(together, together)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(len(TEXTS)))


def test_bfloat16(model, folder):
    half = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    vectors = half.encode(TEXTS, convert_to_tensor=True)
    exact = model.encode(TEXTS, convert_to_tensor=True)
    assert torch.cosine_similarity(vectors.float(), exact).min() > 0.999


def test_a_text_is_read_up_to_the_models_limit(model, folder):
    assert model.max_seq_length == 64
    text = " ".join(WORDS * 3)
    cut = " ".join(text.split()[:62])  # and [CLS], [SEP]
    np.testing.assert_allclose(model.encode(text), model.encode(cut), atol=1e-6)
    unlimited = SentenceTransformer(str(folder), device="cpu")
    unlimited.max_seq_length = 4096
    assert np.abs(unlimited.encode(text) - model.encode(text)).max() > 1e-3
    last_word_differs = np.abs(unlimited.encode(text + " dog") - unlimited.encode(text + " cat")).max()
    assert last_word_differs > 0


def test_learned_positions_limit_the_length():
    vocabulary = {"vocab_size": len(WORDS) + len(SPECIAL)}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = LamConfig(**vocabulary, **sizes, position_embedding_type="learned", max_position_embeddings=32)
    short = sentence_transformer(LamModel(config).eval())
    assert short.max_seq_length == 32
    assert np.isfinite(short.encode("dog " * 100)).all()


def test_a_text_of_100_000_tokens(folder):
    long = SentenceTransformer(str(folder), device="cpu")
    long.max_seq_length = 200_000
    text = "dog " * 100_000
    assert long.preprocess([text])["input_ids"].shape == (1, 100_002)
    vector = long.encode(text)
    assert np.isfinite(vector).all()
    np.testing.assert_allclose(np.linalg.norm(vector), 1, atol=1e-5)


def test_the_stock_trainer_trains_it_and_fills_in_the_card(tmp_path):
    pairs = sentences(64, seed=5)
    rows = Dataset.from_dict({"anchor": pairs, "positive": [" ".join(text.split()[::-1]) for text in pairs]})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=16, learning_rate=1e-2, logging_steps=10,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", gradient_checkpointing=True,
    )  # fmt: skip
    trained = student()
    trainer = SentenceTransformerTrainer(trained, arguments, rows, loss=MultipleNegativesRankingLoss(trained))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "LamModel" in card
    assert "MultipleNegativesRankingLoss" in card
    assert "**Output Dimensionality:** 32" in card


def test_padding_on_either_side_changes_no_vector(model):
    left = student()
    left.tokenizer.padding_side = "left"
    np.testing.assert_allclose(left.encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_the_encoder_saved_again_is_the_same_file(tmp_path):
    """Stored in bfloat16, loaded in float32; the stock save would write 91 MB for its 46."""
    SentenceTransformer(str(CHECKPOINT), device="cpu").save(str(tmp_path))
    for name in ("model.safetensors", "README.md"):
        assert (tmp_path / name).read_bytes() == (CHECKPOINT / name).read_bytes(), name


def test_it_is_pushed_and_loads_by_its_name(hub, model, tmp_path):
    model.push_to_hub("me/encoder")
    loaded = SentenceTransformer("me/encoder", device="cpu")
    np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    files = set(hub.repositories["me/encoder"].files())
    assert {"modules.json", "1_Pooling/config.json", "modeling_lam.py", "README.md"} <= files
    data = ModelCard(hub.repositories["me/encoder"].files()["README.md"].decode()).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    with pytest.raises(Exception, match="Invalid username or password"):
        model.push_to_hub("me/other", token="hf_wrong")


def test_the_committed_encoder_is_pushed_and_loads_by_its_name_without_lalm(hub, tmp_path):
    ours = SentenceTransformer(str(CHECKPOINT), device="cpu")
    ours.push_to_hub("me/lam")
    pushed = hub.repositories["me/lam"].files()
    assert pushed["model.safetensors"] == (CHECKPOINT / "model.safetensors").read_bytes()
    vectors = encode_without_lalm("me/lam", tmp_path, **client_environment(hub, tmp_path / "fresh"))
    np.testing.assert_allclose(vectors, ours.encode(TEXTS), atol=1e-5)
