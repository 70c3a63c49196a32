"""What the padded peer trains on: every real token carries loss, padding carries none."""

from __future__ import annotations


def test_padding_carries_neither_attention_nor_loss() -> None:
    from benchmarks.peers.trainers import _pad

    batch = _pad([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
