"""generate() in all its modes against plain full forwards, and compiled decoding."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationMixin, PreTrainedTokenizerFast, StaticCache, pipeline
from transformers.masking_utils import create_masks_for_generate

from lalm.configuration.configuration_gla import GLAConfig
from lalm.modeling.model_inputs import adopt_cache
from tests.modeling.exact import assert_close, run, tokens
from tests.variants import ROWS, TINY, each_variant, every_row, few_rows

NEW = 6


def build(row, **changes):
    """A model that never stops early, so that every row yields NEW tokens."""
    model = row.build(**changes)
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def greedy_by_hand(model, ids):
    """The definition: one full forward over everything for each new token."""
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def generate(model, ids, **kwargs):
    return model.generate(ids, **({"max_new_tokens": NEW, "do_sample": False} | kwargs))


@each_variant
def test_generation_mixin_stands_among_the_bases(row):
    """Tools look for its name there, and not further up."""
    assert GenerationMixin in row.model_class().__bases__


@every_row
def test_greedy_is_the_argmax_of_full_forwards(row):
    model, ids = build(row), tokens(2, 9)
    assert torch.equal(generate(model, ids), greedy_by_hand(model, ids))


@each_variant
@pytest.mark.slow
def test_a_thousand_tokens_are_the_argmax_of_full_forwards(row):
    """The model is causal: one forward over the finished text holds every full forward that the loop would make."""
    model, ids = build(row, max_position_embeddings=1100), tokens(2, 9)
    out = generate(model, ids, max_new_tokens=1000)
    with torch.no_grad():
        predicted = model(out, use_cache=False).logits.argmax(-1)
    assert torch.equal(out[:, 9:], predicted[:, 8:-1])
    assert out.shape == (2, 1009)
    assert len(out.unique()) > 3, "a model that repeats itself would show little"


@every_row
@pytest.mark.parametrize(("size", "cache"), [(1, "dynamic"), (1, "static"), (2, "dynamic")])
def test_prefill_in_pieces_sees_padding(row, size, cache):
    model, ids = build(row), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = generate(model, ids, attention_mask=mask)
    options = {"prefill_chunk_size": size, "cache_implementation": cache, "disable_compile": True}
    assert torch.equal(generate(model, ids, attention_mask=mask, **options), expected)


@every_row
def test_static_cache(row):
    model, ids = build(row), tokens(2, 9)
    assert torch.equal(generate(model, ids, cache_implementation="static"), greedy_by_hand(model, ids))


@every_row
def test_static_cache_of_padded_prompts(row):
    """Padding inside and at the end of a prompt too, which generate() turns into masks before the forward."""
    model, ids, mask = build(row), tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[1, 3:6] = mask[2, 5:] = 0
    options = {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    expected = generate(model, ids, **options)
    out = generate(model, ids, cache_implementation="static", **options)
    assert_close(torch.stack(out.logits), torch.stack(expected.logits), "logits")


@every_row
def test_left_padded_batch_is_the_singles(row):
    model, ids = build(row), tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :8] = 0
    ids = ids.masked_fill(mask == 0, 0)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        out = generate(model, ids, attention_mask=mask, **options)
        for b in range(3):
            alone = greedy_by_hand(model, ids[b : b + 1, mask[b].bool()])
            assert torch.equal(out[b : b + 1, -NEW:], alone[:, -NEW:]), f"row {b} with {options}"


@every_row
def test_beam_search_reorders_the_states(row):
    model, ids = build(row), tokens(2, 7)
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(model, ids, **options), generate(model, ids, use_cache=False, **options))


@few_rows
def test_sampling_with_a_seed(row):
    model, ids, drawn = build(row), tokens(2, 7), []
    for use_cache in (True, False, True):
        torch.manual_seed(4)
        drawn.append(generate(model, ids, do_sample=True, top_k=0, num_return_sequences=3, use_cache=use_cache))
    assert drawn[0].shape == (6, 7 + NEW)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert len({tuple(row.tolist()) for row in drawn[0][:3]}) > 1, "samples of one prompt should differ"


@few_rows
def test_inputs_embeds(row):
    model, ids = build(row), tokens(2, 7)
    new = generate(model, None, inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(new, greedy_by_hand(model, ids)[:, -NEW:])


@few_rows
def test_second_turn_continues_a_cache(row):
    """A dialogue: the cache of the first answer is handed to the second call, with the whole text so far."""
    model, ids = build(row), tokens(2, 7)
    first = generate(model, ids, return_dict_in_generate=True)
    prompt = torch.cat([first.sequences, tokens(2, 4, seed=6)], 1)
    second = generate(model, prompt, past_key_values=first.past_key_values)
    assert torch.equal(second, greedy_by_hand(model, prompt))


@few_rows
def test_long_prompt_and_short_prompt(row):
    """Prefill by chunks and prefill of a single token both hand their state on."""
    model = build(row, max_position_embeddings=256)
    for length in (1, 140):
        ids = tokens(1, length)
        assert torch.equal(generate(model, ids), greedy_by_hand(model, ids)), length


@few_rows
def test_scores_are_the_logits(row):
    model, ids = build(row), tokens(2, 7)
    out = generate(model, ids, output_logits=True, return_dict_in_generate=True)
    expected, _ = run(model, out.sequences[:, :-1])
    assert_close(torch.stack(out.logits, 1), expected[:, 6:].float(), "logits", tolerance=1e-6)


@few_rows
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_cache_on_the_cpu(row, kind):
    """It is where it would be put, and no other device is asked for."""
    model, ids = build(row), tokens(2, 9)
    assert torch.equal(generate(model, ids, cache_implementation=kind), generate(model, ids))


@pytest.mark.parametrize(
    ("fields", "offloads"),
    [({"sliding_attention_layers": [1], "sliding_window": 4}, False), ({"full_attention_layers": [1]}, True)],
)
def test_an_offloaded_cache_elsewhere_has_something_to_move(fields, offloads):
    config = GLAConfig(**TINY, **fields)
    cache = StaticCache(config=config, max_cache_len=9, offloading=True)
    adopt_cache(cache, config, config.layer_types, torch.device("meta"))
    assert cache.offloading == offloads


@each_variant
def test_continuous_batching_is_refused(row):
    with pytest.raises(ValueError, match="generate"):
        build(row).generate_batch([[5, 6, 7]])


def test_a_compiling_generate_says_so(caplog):
    model, embeds = build(next(row for row in ROWS if row.name == "gla_plain")), torch.empty(1, 1, 0, device="meta")
    cache = StaticCache(config=model.config, max_cache_len=9)
    for _ in range(2):
        model.create_masks_for_generate(
            config=model.config, inputs_embeds=embeds, attention_mask=None, past_key_values=cache
        )
    (message,) = [record.message for record in caplog.records if "compiles" in record.message]
    assert "disable_compile" in message


def compiled_decode(row, backend, steps=5, batch=2, **changes):
    """Prefill in eager mode, then one compiled graph for every later token; returns both logits."""
    model, ids = build(row, **changes), tokens(batch, 9 + steps)
    cache = StaticCache(config=model.config, max_cache_len=32)
    _, cache = run(model, ids[:, :9], past_key_values=cache)
    torch.compiler.reset()
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    logits = []
    for t in range(9, 9 + steps):
        position, embeds = torch.full((batch, 1), t), torch.empty(batch, 1, 0, dtype=model.dtype)
        # generate() prepares the masks of a compiled step outside it, and so do we.
        masks = create_masks_for_generate(model.config, embeds, None, cache, position)
        # After two steps nothing may be left that would compile a graph anew at every token.
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=t > 10):
            out = step(ids[:, t : t + 1], masks, position, past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1), run(model, ids)[0][:, 9:]


@few_rows
@pytest.mark.slow
def test_compiled_decode_has_one_graph(row):
    assert_close(*compiled_decode(row, "aot_eager"), "logits")


@each_variant
@pytest.mark.slow
def test_compiled_decode_by_inductor(row):
    layers = {} if row.name == "based_plain" else {"num_hidden_layers": 1}
    assert_close(*compiled_decode(row, "inductor", **layers), "logits", tolerance=1e-6)


def tiny_tokenizer():
    """Words t3 ... t60 and the special tokens, padding on the left."""
    names = ["<pad>", "<s>", "</s>"] + [f"t{i}" for i in range(3, 61)]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)


@few_rows
def test_text_generation_pipeline_with_a_batch(row):
    model = build(row)
    pipe = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer(), device="cpu")
    prompts = ["t5 t9 t33 t7 t8", "t17", "t4 t4 t20"]
    options = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    batched = pipe(prompts, batch_size=3, **options)
    for prompt, out in zip(prompts, batched, strict=True):
        ids = torch.tensor([[int(word[1:]) for word in prompt.split()]])
        expected = tiny_tokenizer().decode(greedy_by_hand(model, ids)[0, -NEW:], skip_special_tokens=True)
        assert out[0]["generated_text"].split() == expected.split()
