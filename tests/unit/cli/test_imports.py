"""The command and the client start light: neither the training libraries nor a service is imported."""

import json
import subprocess
import sys

FORBIDDEN = ("torch", "transformers", "control_service", "gpu_service", "sqlalchemy")


def test_the_command_imports_neither_torch_nor_a_service() -> None:
    code = "import json, sys, tunesmith_cli.main; print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert set(FORBIDDEN).isdisjoint(json.loads(result.stdout))
