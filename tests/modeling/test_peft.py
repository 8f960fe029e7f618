"""PEFT: every kind of adapter that fits, with the defaults of its tables, trained, merged and generating."""

import peft
import pytest
import torch

import lalm
from tests.modeling.exact import assert_close, run, tokens
from tests.variants import ROWS, TINY, each_variant, few_rows

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
PROMPTS = {
    "prompt": lambda **kw: peft.PromptTuningConfig(num_virtual_tokens=4, **kw),
    "p_tuning": lambda **kw: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, **kw),
    "multitask": lambda **kw: peft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2, **kw),
}


def by_hand(model, embeds, mask, steps):
    """Greedy tokens after `embeds [B, T, D]`, each from one forward over everything before it."""
    text = []
    for _ in range(steps):
        logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[:, -1]
        text.append(logits.argmax(-1))
        embeds = torch.cat([embeds, model.get_input_embeddings()(text[-1])[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
    return torch.stack(text, 1)


@few_rows
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("kind", PROMPTS)
@torch.no_grad()
def test_learned_prompts_generate(row, kind, padding):
    """generate() of trained tokens before the text is forward by forward over both, left padding included."""
    base, ids = row.build(dtype=torch.float32), tokens(2, 9)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, PROMPTS[kind](task_type="CAUSAL_LM")).eval()
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    extra = {"task_ids": torch.tensor([0, 1])} if kind == "multitask" else {}
    text = model.generate(input_ids=ids, attention_mask=mask, **extra, **GREEDY)
    prompt = model.get_prompt(batch_size=2, **extra)
    embeds = torch.cat([prompt, base.get_input_embeddings()(ids)], 1)
    expected = by_hand(base, embeds, torch.cat([mask.new_ones(2, 4), mask], 1), GREEDY["max_new_tokens"])
    assert torch.equal(text[:, -4:], expected)


@each_variant
def test_prefix_tuning_is_refused(row):
    model = peft.get_peft_model(
        row.build(dtype=torch.float32), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    with pytest.raises(ValueError, match="PromptTuningConfig .* LoraConfig"):
        model(input_ids=tokens(2, 5))
    with pytest.raises(ValueError, match="PromptTuningConfig .* LoraConfig"):
        model.generate(input_ids=tokens(2, 5), **GREEDY)


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=4),
    "lora_first_layer": lambda: peft.LoraConfig(r=4, layers_to_transform=[0]),
    "ia3": peft.IA3Config,
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10),
    "norms": peft.LNTuningConfig,
    "whole_modules": lambda: peft.LoraConfig(r=4, modules_to_save=["lm_head", "mixer_norm"]),
}


@each_variant
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_without_named_targets(row, kind):
    """With PEFT's own choice of modules an adapter trains, and merges into a model that computes the same."""
    model, ids = peft.get_peft_model(row.build(dtype=torch.float32), ADAPTERS[kind]()), tokens(2, 9)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after, _ = run(model.eval(), ids)
    assert_close(run(model.merge_and_unload(), ids)[0], after, "merged", tolerance=1e-4)


@each_variant
def test_every_table_of_defaults(row):
    """Each table that knows Llama knows our types, and every name in it is a module of the model."""
    model = row.build()
    model.config.to_dict()
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    tables = [table for name, table in vars(peft.utils.constants).items() if name.endswith("_MODULES_MAPPING")]
    assert tables
    for table in tables:
        if "llama" in table:
            missing = set(table[row.config_class.model_type]) - names
            assert missing <= {"gate_proj"}, "a plain MLP has none"


def test_a_users_own_defaults_stay():
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    kept = table.get("lalm_gla")
    table["lalm_gla"] = ["o_proj"]
    try:
        model = peft.get_peft_model(lalm.GLAForCausalLM(lalm.GLAConfig(**TINY)), peft.LoraConfig())
        assert model.peft_config["default"].target_modules == {"o_proj"}
    finally:
        table["lalm_gla"] = kept or table["llama"]


def test_lora_on_a_short_convolution():
    """By the name of its weight: it is no layer that PEFT knows, but target_parameters takes any."""
    row = next(row for row in ROWS if row.name == "gla_conv_tied")
    config = peft.LoraConfig(r=2, target_parameters=["conv.weight"], init_lora_weights=False)
    model, ids = peft.get_peft_model(row.build(dtype=torch.float32), config).eval(), tokens(2, 9)
    logits, _ = run(model, ids)
    with model.disable_adapter():
        assert (run(model, ids)[0] - logits).abs().max() > 1e-3
    assert_close(run(model.merge_and_unload(), ids)[0], logits, "merged", tolerance=1e-5)
