"""Start real processes for a module of the tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(processes: int, module: str, *arguments: str) -> None:
    """Run a module of the tests in some processes of gloo; fails with what they wrote if one of them fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", module, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    lines = done.stderr.splitlines()
    told = [line for rank in range(processes) for line in lines if line.startswith(f"[rank{rank}]: ")][-400:]
    assert done.returncode == 0, "\n".join(told)
