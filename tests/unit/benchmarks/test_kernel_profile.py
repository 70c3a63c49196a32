"""Kernels by kind: names as torch's profiler gives them, times a step."""

from __future__ import annotations

import pytest

from benchmarks.peers.kernel_profile import OTHER, kind_of, summarize


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantize"),
        ("void at::native::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<float>>", "optimizer"),
        ("_rms_norm_backward", "norm"),
        ("_swiglu_forward", "rope and activation"),
        ("_norm_backward", "norm"),
        ("_add_norm", "norm"),
        ("_gate", "rope and activation"),
        ("_rotate", "rope and activation"),
        ("_gate_adapter_backward", "adapter"),
        ("_reduce_inner", "adapter"),
        ("_round_rows", "rounding to 8 bits"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>", "attention"),
        ("Memcpy HtoD (Pinned -> Device)", "copies and casts"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", OTHER),
    ],
)
def test_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_times_are_of_one_step() -> None:
    rows = [("nvjet_a", 3000.0, 6), ("nvjet_b", 1500.0, 3), ("aten::mm", 0.0, 3)]
    summary = summarize(rows, 3, 0.03)
    assert summary["wall_milliseconds"] == 10.0
    assert summary["kernel_milliseconds"] == 1.5
    assert summary["kinds"] == {"matrix products": {"milliseconds": 1.5, "launches": 3}}
    assert [kernel["name"] for kernel in summary["kernels"]] == ["nvjet_a", "nvjet_b"]
