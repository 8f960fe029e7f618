"""Run transformers-mlinter, the structure linter for Hugging Face model files, over modeling/ and configuration/.

The linter expects a flat model repository, so it gets a flat copy, with relative imports. Its own file of rules
cannot be shortened from outside; the rules below are dropped from its findings, each for the reason beside it.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORT = re.compile(r"from lalm\.(?:modeling|configuration)[\w.]*\.(\w+) import")
OFF = {
    "TRF028": "wants the long licence header of transformers' tree; one line and LICENSE say the same",
    "TRF036": "the gate's Sequential has the parameter names of flash-linear-attention's checkpoints",
    "TRF041": "asks which released checkpoint takes each branch; here each has a row in tests/variants.py",
    "TRF057": "auto_docstring fills in the docstrings of models inside transformers; ours are written out",
}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        for path in [*ROOT.glob("modeling/**/*.py"), *ROOT.glob("configuration/*.py")]:
            if path.name != "__init__.py":
                source = IMPORT.sub(r"from .\1 import", path.read_text(encoding="utf-8"))
                (Path(folder) / path.name).write_text(source, encoding="utf-8")
        command = ["mlinter", "--no-progress", "--no-cache", "--output-json", "findings.json", "."]
        run = subprocess.run(
            [Path(sys.executable).with_name(command[0]), *command[1:]], cwd=folder, capture_output=True
        )
        report = Path(folder) / "findings.json"
        if not report.is_file():
            print(run.stdout.decode(), run.stderr.decode())
            return 2
        findings = json.loads(report.read_text(encoding="utf-8"))["findings"]
    shown = [finding for finding in findings if finding["rule"] not in OFF]
    for finding in shown:
        print(f"{finding['path']}:{finding['line']}: {finding['rule']} {finding['message']}")
    print(f"mlinter: {len(shown)} findings ({len(OFF)} rules off, see .ci/lint_models.py)")
    return int(bool(shown))


if __name__ == "__main__":
    sys.exit(main())
