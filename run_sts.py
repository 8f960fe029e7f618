# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Evaluate sentence encoders on STS-B and train them in stages; the code is in lalm/training/sts/run.py.

    python run_sts.py --model_name_or_path checkpoints/lam-minilm-l6 --eval_only
    accelerate launch run_sts.py recipes/lam_distill.yaml --output_dir runs/lam_distill

The first argument may be a YAML or JSON recipe; flags win over it. Without --data_dir STS-B comes from the Hub, and
without a network a small built-in set of pairs is used. The same command again resumes. An installed lalm has it as
`lalm-sts`.
"""

from lalm.errors import exit_on_user_error
from lalm.training.sts.run import main

if __name__ == "__main__":
    exit_on_user_error(main)
