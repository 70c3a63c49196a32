"""What compiled kernels are searched for, on loops as Triton 3.6 wrote them for Hopper, shortened."""

from __future__ import annotations

from tests.fakes.compiled_loops import find_overtaken

_LOOP = """\
    %piece = ttg.local_alloc : () -> !ttg.memdesc<{pieces}x64x128xbf16, #shared, #smem, mutable>
    %theirs = ttg.local_alloc : () -> !ttg.memdesc<3x128x16xbf16, #shared1, #smem, mutable>
    %0 = ttg.memdesc_index %piece[%c0_i32] : !ttg.memdesc<{pieces}x64x128xbf16> -> !ttg.memdesc<64x128xbf16>
    %1 = ttg.async_copy_global_to_local %at, %0 mask %mask other %zero : tensor<64x128x!tt.ptr<bf16>>
    %2 = ttg.memdesc_index %theirs[%c0_i32] : !ttg.memdesc<3x128x16xbf16> -> !ttg.memdesc<128x16xbf16>
    %3 = ttg.async_copy_global_to_local %at_2, %2 mask %mask_2 other %zero : tensor<128x16x!tt.ptr<bf16>>
    %4 = ttg.memdesc_index %piece[%c1_i32] : !ttg.memdesc<{pieces}x64x128xbf16> -> !ttg.memdesc<64x128xbf16>
    %5 = ttg.async_copy_global_to_local %at_3, %4 mask %mask other %zero : tensor<64x128x!tt.ptr<bf16>>
    %6 = ttg.memdesc_index %theirs[%c1_i32] : !ttg.memdesc<3x128x16xbf16> -> !ttg.memdesc<128x16xbf16>
    %7 = ttg.async_copy_global_to_local %at_4, %6 mask %mask_2 other %zero : tensor<128x16x!tt.ptr<bf16>>
    %8:4 = scf.for %first = %c0_i32 to %c3072_i32 step %c128_i32 iter_args(%total = %zeros) -> (tensor<64x16xf32>) {{
      %9 = ttg.memdesc_index %piece[%use] : !ttg.memdesc<{pieces}x64x128xbf16> -> !ttg.memdesc<64x128xbf16>
      %10 = ttg.memdesc_index %theirs[%use_2] : !ttg.memdesc<3x128x16xbf16> -> !ttg.memdesc<128x16xbf16>
      %11 = ttng.warp_group_dot %9, %10, %total {{inputPrecision = 0 : i32, isAsync = {background}}} : tensor<64x16xf32>
{waits}
      %12 = ttg.memdesc_index %piece[%put] : !ttg.memdesc<{pieces}x64x128xbf16> -> !ttg.memdesc<64x128xbf16>
      %13 = ttg.async_copy_global_to_local %at_5, %12 mask %mask other %zero : tensor<64x128x!tt.ptr<bf16>>
      %14 = ttg.memdesc_index %theirs[%put_2] : !ttg.memdesc<3x128x16xbf16> -> !ttg.memdesc<128x16xbf16>
      %15 = ttg.async_copy_global_to_local %at_6, %14 mask %mask_2 other %zero : tensor<128x16x!tt.ptr<bf16>>
{waits_late}
      scf.yield %11 : tensor<64x16xf32>
    }}
    %16 = ttg.async_wait {{num = 0 : i32}}
"""
_WAIT = "      %w:3 = ttng.warp_group_dot_wait %11, %9, %10 {{pendings = {pendings} : i32}} : tensor<64x16xf32>"


def _loop(*, pieces: int = 2, background: str = "true", waits: str = "", waits_late: str = "") -> str:
    return _LOOP.format(pieces=pieces, background=background, waits=waits, waits_late=waits_late)


def test_a_copy_into_what_is_still_multiplied_is_found() -> None:
    (found,) = find_overtaken(_loop())
    assert found == "%piece has 2 buffers and is copied 2 steps ahead"


def test_waiting_for_the_step_before_is_not_enough() -> None:
    assert len(find_overtaken(_loop(waits=_WAIT.format(pendings=1)))) == 1


def test_waiting_after_the_copies_is_too_late() -> None:
    assert len(find_overtaken(_loop(waits_late=_WAIT.format(pendings=0)))) == 1


def test_a_loop_that_waits_for_its_products_before_it_copies_is_right() -> None:
    assert find_overtaken(_loop(waits=_WAIT.format(pendings=0))) == []


def test_one_buffer_more_is_enough() -> None:
    assert find_overtaken(_loop(pieces=3)) == []


def test_a_product_that_is_not_made_in_the_background_is_not_overtaken() -> None:
    assert find_overtaken(_loop(background="false")) == []
