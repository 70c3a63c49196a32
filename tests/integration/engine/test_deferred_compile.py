"""bitsandbytes imported without torch's compiler; what it handed to it is compiled when it is called."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from gpu_service.engine.deferred_compile import compiling_at_first_call


def test_bitsandbytes_brings_no_compiler() -> None:
    program = """
        import sys, torch
        from gpu_service.engine.deferred_compile import compiling_at_first_call
        real = torch.compile
        with compiling_at_first_call():
            import bitsandbytes
        assert torch.compile is real
        assert "torch._inductor.compile_fx" not in sys.modules, "the compiler came along"
        weight = torch.randn(64, 64).bfloat16()
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert bitsandbytes.functional.dequantize_4bit(packed, state).shape == (64, 64)
    """
    finished = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_the_libraries_are_imported_until_there_is_work() -> None:
    program = """
        import sys, torch
        from gpu_service.engine import libraries
        real = torch.compile

        class Wanted(Exception):
            pass

        def stop():
            raise Wanted

        try:
            libraries.need(stop)
        except Wanted:
            pass
        else:
            raise AssertionError("nobody was asked")
        assert "bitsandbytes" in sys.modules
        assert "peft" not in sys.modules
        assert torch.compile is real
        asked = []
        libraries.need(lambda: asked.append(1))
        assert "peft" in sys.modules
        assert "gpu_service.engine.generation.service" in sys.modules
        libraries.need(stop)
    """
    finished = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("with_options", [True, False])
def test_a_function_is_compiled_once_with_its_options(with_options: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compile_now(function: object, **options: object) -> object:
        seen.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiling_at_first_call():

        def double(value: int) -> int:
            return 2 * value

        double = torch.compile(dynamic=False)(double) if with_options else torch.compile(double)
    assert seen == []
    assert [double(1), double(2)] == [2, 4]
    assert seen == [{"dynamic": False} if with_options else {}]
    compile_after: object = torch.compile
    assert compile_after is compile_now
