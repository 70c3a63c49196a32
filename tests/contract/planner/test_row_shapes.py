"""What control lets in as a row of a format, a node can render: the two know the same formats and the same shapes."""

import copy
import importlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from control_service.domain.dataset_files import Trouble
from control_service.domain.json_text import canonical_bytes
from control_service.domain.row_shapes import KEYS, check_row
from gpu_service.catalog import datasets as dataset_formats
from gpu_service.planner.chat_template import ChatTemplate
from gpu_service.planner.rows import RowError

# Takes whatever a message has; what a real template refuses is for that template to say.
CHAT = ChatTemplate(
    "{{ tools | tojson if tools is not none else '' }}{% for m in messages %}[{{ m | tojson }}]{% endfor %}"
    "{% if add_generation_prompt %}{% endif %}",
    {},
)
USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "chat-messages": [
        {"messages": [{"role": "system", "content": "S"}, USER, ANSWER, USER, ANSWER]},
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "name": "add", "content": "1"},
                ANSWER,
            ],
            "tools": [{"type": "function", "function": {"name": "add"}}],
        },
    ],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}],
    "prompt-completion": [{"prompt": "Q", "completion": "A"}],
    "instruction": [{"instruction": "I", "input": "X", "output": "A"}, {"instruction": "I", "output": "A"}],
    "text": [{"text": "T"}],
    "preference": [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": "B", "tools": []},
        {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "B"}]},
    ],
}
JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [None, "", "x", "\ud800", 0, True, [], {}, ["x"], [USER], [ANSWER], [{}], USER, {"role": "assistant"}]
)


def test_both_know_the_same_formats() -> None:
    assert set(KEYS) == set(dataset_formats.REGISTRY) == set(ROWS)
    for entry in dataset_formats.REGISTRY.values():
        assert set(entry.columns) == KEYS[entry.id]


def render(format: str, row: dict[str, Any]) -> None:
    importlib.import_module(dataset_formats.REGISTRY[format].builder).render(row, CHAT)


@pytest.mark.parametrize(("format", "row"), [(format, row) for format, rows in ROWS.items() for row in rows])
def test_good_rows_are_good_to_both(format: str, row: dict[str, Any]) -> None:
    check_row(row, format)
    render(format, row)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a row that something else could stand at."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    return found + [place for key, item in inner for place in places(item, (*path, key))]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_control_lets_in_can_be_rendered(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(sorted(ROWS)))
    row = copy.deepcopy(data.draw(st.sampled_from(ROWS[format])))
    for _ in range(data.draw(st.integers(1, 3))):
        found = places(row)
        if not found:
            break
        *path, last = data.draw(st.sampled_from(found))
        holder: Any = row
        for key in path:
            holder = holder[key]
        if data.draw(st.booleans()):
            del holder[last]
        else:
            holder[last] = copy.deepcopy(data.draw(JUNK))
    try:
        check_row(row, format)
        canonical_bytes(row)
    except Trouble:
        return
    try:
        render(format, row)
    except RowError as error:
        raise AssertionError(f"{format} {row!r} was let in: {error}") from error
