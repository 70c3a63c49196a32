"""The unit tests stay what they are for: collected without the training libraries being imported."""

import json
import subprocess
import sys

from tests.conftest import ROOT

COLLECT = """
import json, sys, pytest
status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/unit"])
print(json.dumps({"status": int(status), "heavy": sorted({"torch", "transformers", "peft"} & set(sys.modules))}))
"""


def test_collecting_the_unit_tests_imports_no_training_library() -> None:
    result = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, check=True, timeout=110
    )
    assert json.loads(result.stdout.splitlines()[-1]) == {"status": 0, "heavy": []}
