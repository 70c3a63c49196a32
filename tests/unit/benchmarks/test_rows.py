"""Rows and sides: what is asked of ours is what the row says, and nothing that this version does not have."""

from __future__ import annotations

import pytest
from google.protobuf import json_format

from benchmarks.against_peer import KNOWN_FIELDS
from benchmarks.peers.rows import ROWS
from benchmarks.peers.sides import OURS, PEERS, SIDES
from benchmarks.random_models import SHAPES
from tunesmith.common.v1 import training_spec_pb2

_OFFERED = [name for name, row in ROWS.items() if not row.missing_fields(KNOWN_FIELDS)]


@pytest.mark.parametrize("name", _OFFERED)
def test_settings_are_of_the_contract(name: str) -> None:
    settings = json_format.ParseDict(ROWS[name].settings(40, KNOWN_FIELDS), training_spec_pb2.Hyperparameters())
    assert settings.num_steps == 40
    assert settings.batch.tokens == ROWS[name].tokens_per_step
    assert settings.HasField("lora") == (ROWS[name].training_type != "full")


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_of_a_known_shape_and_peers(name: str) -> None:
    row = ROWS[name]
    assert row.shape in SHAPES
    assert row.peers
    assert set(row.peers) <= set(PEERS)
    assert row.stream in ("dense", "mixed")


def test_a_field_that_is_not_there_is_left_out() -> None:
    assert "base_weights" not in ROWS["dense"].settings(1, {"gradient_checkpointing"})
    assert ROWS["dense"].settings(1, {"base_weights"})["base_weights"] == "streamed"


def test_a_row_that_needs_a_field_says_so() -> None:
    assert ROWS["resident"].missing_fields({"trainer"}) == ["base_weights"]
    assert ROWS["resident"].missing_fields({"base_weights"}) == []


def test_every_row_is_offered_by_this_version() -> None:
    missing = {name: row.missing_fields(KNOWN_FIELDS) for name, row in ROWS.items() if name not in _OFFERED}
    # A row that is not offered is said to be that, never measured with something else.
    assert all(missing.values())


def test_ours_is_no_peer() -> None:
    assert OURS not in PEERS
    assert SIDES["transformers"].packs is False
    assert SIDES["transformers"].recomputes is True
