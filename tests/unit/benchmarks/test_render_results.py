"""docs/performance.md and README.md say what benchmarks/results says, and nothing where nothing was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import render_results
from benchmarks.peers import rates
from benchmarks.result_tables import beside, rest, training


def _side(milliseconds: float, **changes: Any) -> dict[str, Any]:
    side = {
        "intervals": [[(1, milliseconds), (2, milliseconds)]],
        "step_tokens": [8192] * 3,
        "losses": [4.0, 3.0, 2.0],
        "first_batch_loss": 4.0,
        "peak_allocated_bytes": 24 * 1024**3,
        "device_used_bytes": 25 * 1024**3,
        "versions": {"torch": "2.11.0"},
        "profile": {},
        **changes,
    }
    return {**side, **rates.summarize(side)}


def _result() -> dict[str, Any]:
    profile = {"kinds": {"attention": {"milliseconds": 24.0, "launches": 84}}, "kernel_milliseconds": 210.0}
    sides = {"tunesmith": _side(256.0, profile={**profile, "wall_milliseconds": 215.0}), "trl": _side(512.0)}
    return {
        "row": "dense",
        "when": "2026-11-23",
        "device": "NVIDIA H100 80GB HBM3",
        "settings": {"alternations": 3, "turn_steps": 8, "warmup_steps": 8, "together": True},
        "sides": sides,
        "ratios": {"trl": 2.0},
        "parity": {"trl": rates.compare_losses(sides["tunesmith"], sides["trl"])},
        "ceiling": {"step_milliseconds": 151.0},
    }


_PAGES = {render_results.PAGE: render_results.SECTIONS, render_results.READ_ME: render_results.SUMMARIES}


@pytest.mark.parametrize("path", _PAGES)
def test_page_and_results_agree(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert page == render_results.render(page, render_results.read_results(render_results.RESULTS))


@pytest.mark.parametrize("path", _PAGES)
def test_every_section_is_on_its_page(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert all(page.count(f"<!-- results: {name} -->") == 1 for name in _PAGES[path])


@pytest.mark.parametrize("section", [*render_results.SECTIONS.values(), *render_results.SUMMARIES.values()])
def test_nothing_measured_is_nothing_said(section: render_results.Section) -> None:
    assert section.render({}) == ""


def test_of_several_runs_the_worst_ratio_is_said_and_other_devices_are_not() -> None:
    best, worst = _result(), _result()
    best["ratios"]["trl"] = 2.4
    silent = {
        **_result(),
        "ratios": {"tunesmith-silent": 1.0},
        "sides": {**_result()["sides"], "tunesmith-silent": _side(256.0)},
    }
    other = {**_result(), "device": "NVIDIA H200", "ratios": {"trl": 0.5}}
    lines = beside.beside_table({"h100-one": best, "h100-two": worst, "h100-three": silent, "h200-one": other})
    (line,) = lines[2:]
    assert line.endswith("| 2.00 | 1.00 |")
    assert "TRL" in line


def test_starts_and_loads_are_held_against_the_libraries_of_the_same_run() -> None:
    starts = [{"case": "peer", "seconds": 18.0}, {"case": "warm", "seconds": 0.6}, {"case": "warm", "seconds": 0.4}]
    loads = [
        {"size": "3B", "row": "library", "seconds": 1.5},
        {"size": "3B", "row": "files", "seconds": 0.5},
        {"size": "3B", "row": "files", "seconds": 4.0, "cold": True},
        {"size": "8B", "row": "files", "seconds": 9.0},
    ]
    alone = [{"size": "3B", "row": "copy", "seconds": 0.1}]
    found = beside.beside_table({"h100-a": {"rows": starts}, "h100-b": {"rows": loads}, "h100-c": {"rows": alone}})
    assert [line.split(" | ")[2:] for line in found[2:]] == [["36.0", " |"], ["3.0", " |"]]


def test_tables_are_filled_from_results_and_old_text_goes() -> None:
    page = "before\n<!-- results: training -->\nold\n<!-- end -->\nafter\n"
    rendered = render_results.render(page, {"one": _result()})
    assert "old" not in rendered
    assert "| one | NVIDIA H100 80GB HBM3 | dense | tunesmith | 32,000 |" in rendered
    assert rendered.startswith("before\n")
    assert rendered.endswith("<!-- end -->\nafter\n")
    assert render_results.render(rendered, {"one": _result()}) == rendered


def test_the_ceiling_stands_under_the_profile() -> None:
    other = _result()
    other["sides"]["tunesmith"]["profile"]["kinds"] = {"adapter": {"milliseconds": 10.0, "launches": 28}}
    lines = training.profile_table({"one": _result(), "two": other})
    assert lines[-1] == "| frozen products alone, same run | 151.0 | 151.0 |"
    # A kind that a run did not tell from others is not said to have taken no time.
    assert "| attention | 24.0 |  |" in lines
    assert "| adapter |  | 10.0 |" in lines


def test_a_marker_of_no_table_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        render_results.render("<!-- results: weather -->\n<!-- end -->\n", {})


def test_loading_and_starting_are_told_apart_by_their_rows() -> None:
    results: dict[str, Any] = {
        "load-3b": {"rows": [{"size": "3B", "row": "files", "cold": False, "seconds": 0.5}]},
        "start-3b": {"rows": [{"case": "warm", "seconds": 0.9}, {"case": "warm", "seconds": 0.7}]},
    }
    assert rest.loading_table(results)[2:] == ["| load-3b | 3B | files | warm | 0.500 | 0.500 | 0.500 | 1 |"]
    assert rest.starting_table(results)[2:] == ["| start-3b | warm | 0.800 | 0.700 | 0.900 | 2 |"]


def test_rows_without_a_gpu_come_from_one_document() -> None:
    control = {"rows": {"unary_reads": {"ours": {"rate": 1234.5}, "calls": 3}}}
    host = {"ways": {"trl": {"fill": 0.99, "pack_seconds": 0.4, "step_milliseconds": 4.0}}}
    results = {"cpu": {"scripts": {"control-plane": {"rows": control}, "host-side": {"rows": host}}}}
    assert rest.control_plane_table(results)[2:] == [
        "| cpu | unary_reads | ours, rate | 1234 |",
        "| cpu | unary_reads | calls | 3 |",
    ]
    assert rest.host_table(results)[2:] == ["| cpu | trl | 99.00% | 400 | 4.000 |"]


def test_what_was_tried_is_held_against_the_same_row(tmp_path: Path) -> None:
    printed = [
        "a warning of some library",
        '{"part": "steps", "row": "dense", "change": "as trained", "ms": 200.0}',
        '{"part": "steps", "row": "dense", "change": "another way", "ms": 210.0}',
        '{"part": "gemm", "name": "head", "ms": [2.25, 2.5]}',
        '{"part": "profile", "row": "dense", "wall": 216.5, "families": {"norm": 5.5}, "kernels": [["a", 1.0]]}',
    ]
    (tmp_path / "step-parts.jsonl").write_text("\n".join(printed))
    results = render_results.read_results(tmp_path)
    assert rest.tried_table(results)[2:] == [
        "| step-parts | dense | as trained | 200.0 |  |",
        "| step-parts | dense | another way | 210.0 | +5.0% |",
    ]
    assert rest.parts_table(results)[2:] == [
        "| step-parts | gemm | head | ms [2.25, 2.5] |",
        "| step-parts | profile | dense | wall 216.5; families, norm 5.5 |",
    ]
