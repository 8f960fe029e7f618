# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Train and evaluate a causal language model; the code is in lalm/training/clm/run.py.

    accelerate launch run_clm.py recipes/lalm_base.yaml --output_dir runs/base
    python run_clm.py --model_type lalm_gla --train_file text.txt --output_dir runs/text
    python run_clm.py --model_name_or_path runs/base --compare_with runs/text --do_eval --output_dir runs/scores

The first argument may be a YAML or JSON recipe; flags win over it. Without any data the Python language reference is
used. The same command again resumes. `LALM_DEBUG=1` shows tracebacks. An installed lalm has it as `lalm-clm`.
"""

from lalm.errors import exit_on_user_error
from lalm.training.clm.run import main

if __name__ == "__main__":
    exit_on_user_error(main)
