# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Load a trained checkpoint as anyone would, without lalm, generate from it, and sum up its run.

python experiments/generate_demo.py runs/demo
"""

import argparse
import json
import sys
import time
from pathlib import Path

PROMPTS = ("The following", "A class", "If the object")


def load(folder: Path):
    """Return (tokenizer, model) of a checkpoint folder, by the code stored with its weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    return tokenizer, model


def generate(tokenizer, model, new_tokens: int) -> float:
    """Print a sampled continuation of each prompt; return new tokens/s."""
    from transformers import set_seed

    set_seed(0)
    produced, begun = 0, time.perf_counter()
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.7,
            top_k=40,
            pad_token_id=tokenizer.pad_token_id,
        )
        produced += out.shape[1] - inputs["input_ids"].shape[1]
        print(f"\n  > {tokenizer.decode(out[0], skip_special_tokens=True)}")
    return produced / (time.perf_counter() - begun)


def main() -> None:
    """Generate and print the closing lines of `make demo`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder of run_clm.py")
    parser.add_argument("--max_new_tokens", type=int, default=40)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    results_file = folder / "all_results.json"
    if not results_file.is_file():
        print(f"error: {folder} holds no finished run; train one with run_clm.py first", file=sys.stderr)
        sys.exit(2)
    results = json.loads(results_file.read_text(encoding="utf-8"))
    tokenizer, model = load(folder)
    speed = generate(tokenizer, model, arguments.max_new_tokens)
    if "lalm" in sys.modules:
        raise RuntimeError("lalm was imported: the checkpoint does not stand on its own")
    curve = folder / "loss_curve.png"
    print(f"\nperplexity   {results['before_perplexity']:.1f} before training, {results['eval_perplexity']:.1f} after")
    print(f"speed        {results['tokens_per_second']:,.0f} tokens/s in training, {speed:,.0f} in generation")
    print(f"checkpoint   {folder} ({type(model).__name__}, loaded without lalm)")
    print(f"loss curve   {curve if curve.is_file() else 'not drawn: matplotlib is not installed'}")
    print("try next     your own text: accelerate launch run_clm.py recipes/demo_gla.yaml --train_file my.txt \\")
    print("               --output_dir runs/mine")
    print("             another model: ... --model_type lalm_linear, or --config_overrides hidden_size=256")


if __name__ == "__main__":
    main()
