"""Encoders (is_causal=False): both sides count, padding and neighbouring documents do not."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    DynamicCache,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from lalm.modeling.ops import dispatch
from tests.modeling.exact import (
    add_gradients,
    assert_close,
    assert_same_gradients,
    backward,
    tokens,
    weights_like,
)
from tests.modeling.test_packing import FORMS, LENGTHS, boundaries, spans
from tests.modeling.test_padding import KINDS, mask_of
from tests.variants import ENCODER_HEADS, ENCODERS, every_encoder

LENGTH = 21
MASKED = "AutoModelForMaskedLM"
each_encoder = pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name) for row in ENCODERS if row.name.endswith("_encoder")]
)


def logits_of(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@every_encoder
@pytest.mark.parametrize("position", [0, 10, 20])
def test_every_token_sees_both_sides(row, position):
    model, ids = row.build(MASKED), tokens(2, LENGTH)
    changed = ids.clone()
    changed[:, position] = (changed[:, position] - 3 + 1) % 58 + 3
    difference = (logits_of(model, changed) - logits_of(model, ids)).abs().amax(-1)
    assert difference.min() > 1e-7


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="default"),
        pytest.param({"use_short_conv": False, "position_embedding_type": "rope"}, id="rope"),
        pytest.param({"expand_v": 2.0, "use_output_gate": True, "conv_size": 3}, id="wide"),
        pytest.param({"full_attention_layers": [1]}, id="hybrid"),
    ],
)
def test_long_texts_run_in_segments(monkeypatch, overrides):
    """LAM's layers then hold no q, k and v of the whole text; vectors are the same."""
    row = next(row for row in ENCODERS if row.name == "lam_encoder")
    model, ids = row.build("AutoModel", **overrides), tokens(2, 37)
    sizes = []
    model.layers[0].mixer.q_proj.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    with torch.no_grad():
        whole = model(ids).last_hidden_state
        monkeypatch.setattr(dispatch, "LONG_TEXT", 30)
        monkeypatch.setattr(dispatch, "SEGMENT_OF_TEXT", 9)
        in_segments = model(ids, output_hidden_states=True)
        model(ids, attention_mask=torch.arange(37).expand(2, -1).ge(3).long())
    reach = model.config.conv_size - 1 if model.config.use_short_conv else 0
    assert len(sizes) == 12
    assert max(sizes[1:-1]) == 9 + 2 * reach
    assert sizes[0] == sizes[-1] == 37
    assert_close(in_segments.last_hidden_state, whole)
    model(ids).last_hidden_state.sum().backward()  # which keeps the activations of the whole text
    assert sizes[-1] == 37


@every_encoder
def test_reversed_text_gives_reversed_outputs(row):
    """Neither direction is special, where no position embedding and no lopsided window says so."""
    width = {"conv_size": 3} if row.config().use_short_conv else {}
    model, ids = row.build(MASKED, position_embedding_type="none", **width), tokens(2, LENGTH)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "conv") and module.conv is not None:
                module.conv.weight.copy_(module.conv.weight + module.conv.weight.flip(-1))
    assert_close(logits_of(model, ids.flip(1)).flip(1), logits_of(model, ids), "reversed")


@every_encoder
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_not_there(row, kind):
    model, ids, mask = row.build(MASKED), tokens(3, LENGTH), mask_of(kind)
    embeds = model.get_input_embeddings()(ids)
    cotangent = weights_like(logits_of(model, ids)) * mask[..., None]
    logits, grad, parameters = backward(model, embeds, cotangent, attention_mask=mask)
    total = {}
    for b in range(3):
        real = mask[b].bool()
        expected, expected_grad, more = backward(model, embeds[b : b + 1, real], cotangent[b : b + 1, real])
        assert_close(logits[b : b + 1, real], expected, f"row {b}")
        assert_close(grad[b : b + 1, real], expected_grad, f"gradient of row {b}")
        total = add_gradients(total, more)
    assert_same_gradients(parameters, total)


@every_encoder
@pytest.mark.parametrize("form", FORMS)
def test_documents_are_alone(row, form):
    model, ids = row.build(MASKED), tokens(1, sum(LENGTHS))
    embeds = model.get_input_embeddings()(ids)
    cotangent = weights_like(logits_of(model, ids))
    logits, grad, parameters = backward(model, embeds, cotangent, **boundaries(LENGTHS, (form,)))
    total = {}
    for span in spans(LENGTHS):
        expected, expected_grad, more = backward(model, embeds[:, span], cotangent[:, span])
        assert_close(logits[:, span], expected, f"tokens {span}")
        assert_close(grad[:, span], expected_grad, f"gradient of {span}")
        total = add_gradients(total, more)
    assert_same_gradients(parameters, total)


@every_encoder
def test_padding_and_documents_together(row):
    model, ids = row.build(MASKED), tokens(2, 14)
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0], [1] * 10 + [0] * 4])
    segments = torch.tensor([[0] * 4 + [1] * 4 + [2] * 6, [0] * 7 + [1] * 7])
    logits = logits_of(model, ids, attention_mask=mask, seq_idx=segments)
    for b in range(2):
        for document in segments[b].unique():
            own = (segments[b] == document) & mask[b].bool()
            assert_close(logits[b : b + 1, own], logits_of(model, ids[b : b + 1, own]), f"row {b} {document}")


@every_encoder
@pytest.mark.parametrize("length", [1, 2, 70, 130])
def test_implementations_agree(row, length):
    ids = tokens(2, length)
    changes = {"max_position_embeddings": 256}
    expected = logits_of(row.build(MASKED, linear_attn_implementation="recurrent", **changes), ids)
    for name in ("chunk", "auto"):
        assert_close(logits_of(row.build(MASKED, linear_attn_implementation=name, **changes), ids), expected, name)


@each_encoder
def test_masked_lm_loss_and_heads(row):
    ids = tokens(2, LENGTH)
    labels = ids.masked_fill(torch.arange(LENGTH) % 3 > 0, -100)
    out = row.build(MASKED)(ids, labels=labels)
    assert_close(out.loss.double(), F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()), "loss", 1e-6)
    mask = mask_of("right")[:2]
    model = row.build("AutoModelForSequenceClassification", num_labels=3)
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    mean = torch.stack([hidden[b, mask[b].bool()].mean(0) for b in range(2)])
    assert_close(model(ids, attention_mask=mask).logits, model.score(mean), "mean of the real tokens")
    assert row.build("AutoModelForTokenClassification", num_labels=4)(ids).logits.shape == (2, LENGTH, 4)


@each_encoder
def test_what_an_encoder_cannot_do(row):
    with pytest.raises(ValueError, match="is_causal=True"):
        row.model_class("AutoModelForCausalLM")(row.config())
    with pytest.raises(ValueError, match="is_causal=False"):
        row.model_class(MASKED)(row.config(is_causal=True))
    model = row.build("AutoModel")
    assert model(tokens(1, 5), use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values needs is_causal=True"):
        model(tokens(1, 5), past_key_values=DynamicCache())


@every_encoder
@pytest.mark.parametrize("head", ENCODER_HEADS)
def test_encoders_load_as_saved(row, head, tmp_path):
    model, ids = row.build(head, num_labels=3), tokens(1, LENGTH)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for weight in loaded.parameters():
        # As they lie in the file: where a matrix begins decides in which order some processors' libraries add.
        weight.data = weight.data.clone()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids)[0], model(ids)[0])


@each_encoder
@pytest.mark.slow
def test_trains_and_fills_masks(row, tmp_path):
    """The stock collator, Trainer, Auto class and pipeline, on a text whose second words follow from the first."""
    words = ["<pad>", "<mask>", "<unk>", "red", "rose", "blue", "sky", "green", "leaf"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", mask_token="<mask>", unk_token="<unk>"
    )
    pairs = ["red rose", "blue sky", "green leaf"]
    texts = [" ".join([pairs[i % 3]] * (1 + i % 4)) for i in range(48)]
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(row.config(vocab_size=len(words), tie_word_embeddings=True))
    trainer = Trainer(
        model,
        TrainingArguments(
            tmp_path / "run",
            max_steps=300,  # 150 leave one word of three open for some seeds
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
        Dataset.from_dict(dict(tokenizer(texts, return_token_type_ids=False))),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(tmp_path / "model")
    fill = pipeline("fill-mask", str(tmp_path / "model"))
    assert [fill(text)[0]["token_str"] for text in ("blue <mask>", "<mask> rose", "green <mask> green leaf")] == [
        "sky",
        "red",
        "leaf",
    ]
