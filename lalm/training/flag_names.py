# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""What a mistyped or foreign name of an argument was meant to be."""

from collections.abc import Sequence

from lalm.errors import nearest_hint

# what users of other scripts and papers type, and our names for it in the order in which they are tried
MEANT: dict[str, tuple[str, ...]] = {
    "per_device_train_batch_size": ("batch_size", "train_batch_size", "per_gpu_train_batch_size", "bs", "batch"),
    "per_device_eval_batch_size": ("eval_batch_size", "per_gpu_eval_batch_size", "test_batch_size"),
    "gradient_accumulation_steps": ("accumulation_steps", "grad_accum", "gradient_accumulation", "accumulation"),
    "learning_rate": ("lr", "rate", "max_lr", "peak_lr"),
    "lr_scheduler_type": ("scheduler", "lr_scheduler", "schedule", "lr_schedule"),
    "warmup_steps": ("warmup", "warmup_ratio", "num_warmup_steps"),
    "optim": ("optimizer", "optimiser"),
    "weight_decay": ("wd", "decay"),
    "max_grad_norm": ("grad_clip", "clip", "clip_grad", "gradient_clipping", "max_norm"),
    "label_smoothing_factor": ("label_smoothing", "smoothing"),
    "num_train_epochs": ("epochs", "epoch", "num_epochs", "n_epochs", "train_epochs", "max_epochs"),
    "max_steps": ("steps", "num_steps", "train_steps", "num_train_steps", "max_train_steps", "iterations",
                  "max_iters"),
    "model_name_or_path": ("model", "model_name", "model_path", "checkpoint", "pretrained", "ckpt"),
    "model_type": ("type", "arch", "architecture", "model_class"),
    "tokenizer_name": ("tokenizer", "tokenizer_path", "tokenizer_name_or_path"),
    "tokenizer_vocab_size": ("vocab_size", "vocab"),
    "config_overrides": ("config", "overrides", "model_config", "config_name"),
    "output_dir": ("output", "out", "out_dir", "outdir", "save_dir", "output_path", "output_folder", "o"),
    "start_over": ("overwrite", "overwrite_output_dir", "force", "restart"),
    "resume_from_checkpoint": ("resume", "resume_from", "continue"),
    "dataset_name": ("dataset", "data", "dataset_path", "dataset_id"),
    "data_dir": ("dataset", "data", "sts_dir", "stsb_dir"),
    "dataset_config_name": ("dataset_config", "data_config", "subset"),
    "train_file": ("train", "train_data", "train_files", "text", "text_file", "input", "file", "data_path"),
    "validation_file": ("valid_file", "eval_file", "dev_file", "val_file", "validation_files", "validation"),
    "test_file": ("test_data", "test_files"),
    "validation_split_percentage": ("validation_split", "val_split", "split"),
    "text_column": ("text_field", "text_column_name", "column", "dataset_text_field"),
    "block_size": ("seq_len", "seq_length", "sequence_length", "context_length", "max_length", "max_seq_length",
                   "max_len", "context", "context_size"),
    "max_seq_length": ("seq_len", "seq_length", "max_length", "max_len", "block_size", "max_seq_len"),
    "eval_strategy": ("evaluation_strategy", "evaluate", "evaluate_during_training"),
    "eval_steps": ("eval_every", "eval_interval", "evaluation_steps"),
    "save_steps": ("save_every", "save_interval", "checkpoint_steps", "checkpointing_steps"),
    "logging_steps": ("log_every", "log_interval", "log_steps"),
    "dataloader_num_workers": ("workers", "num_workers"),
    "preprocessing_num_workers": ("num_proc", "n_proc"),
    "use_cpu": ("cpu", "no_cuda", "device"),
    "bf16": ("bfloat16", "mixed_precision", "amp", "precision"),
    "fp16": ("float16", "half"),
    "dtype": ("torch_dtype",),
    "do_eval": ("eval", "evaluation"),
    "do_test": ("test", "predict"),
    "report_to": ("wandb", "tracker", "log_to", "use_wandb", "tensorboard"),
    "train_sampling_strategy": ("group_by_length", "shuffle"),
    "teacher": ("teacher_model", "teacher_name", "teacher_name_or_path"),
    "push_to_hub": ("push", "upload", "hub"),
    "trust_remote_code": ("remote_code",),
    "attn_implementation": ("attention", "attn"),
    "hidden_size": ("d_model", "n_embd", "dim", "width", "embed_dim", "model_dim"),
    "num_hidden_layers": ("n_layers", "n_layer", "num_layers", "layers", "depth"),
    "num_attention_heads": ("n_heads", "n_head", "num_heads", "heads"),
    "intermediate_size": ("d_ff", "ffn_dim", "mlp_dim"),
}  # fmt: skip


def name_hint(name: str, known: Sequence[str]) -> str:
    """Return ``" (did you mean 'x'?)"``: what the name is called here, else the nearest of `known`, else nothing."""
    plain = name.lower().replace("-", "_")
    meant = next((ours for ours, theirs in MEANT.items() if ours in known and plain in theirs), None)
    return f" (did you mean '{meant}'?)" if meant else nearest_hint(name, known)
