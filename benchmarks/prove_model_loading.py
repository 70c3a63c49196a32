"""Proves what made `'dict' object has no attribute 'model_type'`: a tokenizer, one version, one size of vocabulary.

Makes a throwaway virtual environment for each version of transformers, writes tiny checkpoints without weights, and
loads their tokenizers there. With `--with-model` it also loads a tiny Llama in 4 bits under the reported versions and
shows its config's class. Downloads from the package index only; changes nothing outside its temporary directory.

    python benchmarks/prove_model_loading.py [--with-model] [--versions 4.57.2 4.57.6]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BAD_VERSION = "4.57.2"
GOOD_VERSION = "4.57.6"
ERROR = "'dict' object has no attribute 'model_type'"
# The rest of what the report had installed.
MODEL_REQUIREMENTS = ("torch", "accelerate", "bitsandbytes==0.49.0", "peft==0.18.0")
LARGE_VOCABULARY, SMALL_VOCABULARY = 128_256, 4_096


@dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint: how many tokens, and which transformers its config says wrote it."""

    vocabulary_size: int
    written_by: str

    @property
    def name(self) -> str:
        return f"vocabulary-{self.vocabulary_size}-written-by-{self.written_by}"


CASES = (
    Case(vocabulary_size=LARGE_VOCABULARY, written_by="4.57.2"),
    Case(vocabulary_size=LARGE_VOCABULARY, written_by="4.57.3"),
    Case(vocabulary_size=SMALL_VOCABULARY, written_by="4.57.2"),
)

# Runs in the throwaway environment: the directory with the checkpoints, then the cases, then whether to load a model.
_PROBE = """
import json, sys, traceback
from pathlib import Path
from transformers import AutoTokenizer

root, cases, with_model = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == "True"
for case in cases:
    found = {"case": case["name"], "what": "tokenizer", "error": "", "where": ""}
    try:
        found["result"] = type(AutoTokenizer.from_pretrained(root / case["name"])).__name__
    except AttributeError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno} {frame.name}: {frame.line}"
        found |= {"error": str(error), "where": place}
    print(json.dumps(found), flush=True)
if with_model:
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    directory = root / cases[0]["name"]
    config = LlamaConfig.from_pretrained(directory)
    LlamaForCausalLM(config).save_pretrained(root / "model")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(root / "model", quantization_config=quantization)
    prepare_model_for_kbit_training(model)
    linear = type(model.model.layers[0].self_attn.q_proj).__name__
    found = {"case": cases[0]["name"], "what": f"model, 4 bits ({linear})", "error": "", "where": ""}
    print(json.dumps(found | {"result": f"config is a {type(model.config).__name__}"}), flush=True)
"""


def write_checkpoint(directory: Path, case: Case) -> None:
    """config.json and tokenizer files of a tiny Llama, with a vocabulary that no text ever reaches the end of."""
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": case.vocabulary_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "transformers_version": case.written_by,
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {f"token_{index}": index for index in range(case.vocabulary_size)},
            "merges": [],
        },
    }
    files: dict[str, dict[str, Any]] = {
        "config.json": config,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")


def probe(root: Path, version: str, *, with_model: bool) -> list[dict[str, str]]:
    """What happens under one version of transformers. Raises CalledProcessError when pip or the probe itself fails."""
    environment = root / f"transformers-{version}"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    requirements = [f"transformers=={version}", *(MODEL_REQUIREMENTS if with_model else ())]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    cases = json.dumps([asdict(case) | {"name": case.name} for case in CASES])
    output = subprocess.run(
        [python, "-c", _PROBE, str(root), cases, str(with_model)], check=True, capture_output=True, text=True
    ).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def main() -> int:
    """Print what was found; status 0 when it is what the documentation says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with-model", action="store_true", help="also load a model in 4 bits (installs torch)")
    parser.add_argument("--versions", nargs="+", default=[BAD_VERSION, GOOD_VERSION])
    options = parser.parse_args()
    as_documented = True
    with tempfile.TemporaryDirectory(prefix="prove-model-loading-") as temporary:
        root = Path(temporary)
        for case in CASES:
            write_checkpoint(root / case.name, case)
        for version in options.versions:
            for found in probe(root, version, with_model=options.with_model and version == BAD_VERSION):
                is_bad = version == BAD_VERSION and found["case"] == CASES[0].name and found["what"] == "tokenizer"
                as_documented &= found["error"] == (ERROR if is_bad else "")
                print(f"transformers {version}  {found['case']}  {found['what']}: {found['error'] or found['result']}")
                if found["where"]:
                    print(f"    raised at {found['where']}")
    print("as documented" if as_documented else "NOT as documented")
    return 0 if as_documented else 1


if __name__ == "__main__":
    sys.exit(main())
