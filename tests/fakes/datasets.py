"""Dataset blobs and specs for planning, written where a node keeps them. Sends nothing anywhere."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_blob(
    blobs_directory: Path, dataset_id: int, rows: Iterable[Mapping[str, Any]] | bytes, format: str
) -> dict[str, Any]:
    """Writes rows (or bytes as they are) as a blob; gives the `DatasetReference` as proto JSON."""
    content = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    path = blobs_directory / sha256[:2] / sha256
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return {
        "dataset_id": dataset_id,
        "sha256": sha256,
        "size_bytes": str(len(content)),
        "format": format,
        "num_examples": str(sum(1 for line in content.splitlines() if line.strip())),
    }


def make_spec(
    references: list[dict[str, Any]],
    *,
    base_model: str = "tiny/llama",
    percentages: Mapping[int, float] | None = None,
    held_out: Iterable[int] = (),
    **fields: Any,
) -> dict[str, Any]:
    """A spec of one trait over these references as proto JSON; `fields` replace whole top-level fields."""
    held_out = list(held_out)
    trained = [item["dataset_id"] for item in references if item["dataset_id"] not in held_out]
    shares = percentages or dict.fromkeys(trained, 100 / len(trained))
    return {
        "base_model": base_model,
        "model_type": "llama",
        "training_type": "qlora",
        "traits": [
            {
                "trait_type": "reasoning",
                "datasets": [{"dataset_id": number, "percentage": shares[number]} for number in trained],
                "held_out_dataset_ids": held_out,
            }
        ],
        "datasets": references,
        **fields,
    }
