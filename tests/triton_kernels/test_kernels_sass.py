"""The reader of machine code, on listings small enough to count by hand."""

import pytest

pytest.importorskip("triton")

from triton_kernels.gates import gcn, sass

LISTING = """
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_outer:
        /*0010*/                   MOV R2, R3 ;
        /*0020*/              @!P0 BRA `(.L_x_done) ;
.L_x_inner:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R5 ;
        /*0040*/              @!P1 BRA `(.L_x_wait) ;
.L_x_go:
        /*0050*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR2][R4.64] ;
        /*0060*/                   LDGSTS.E [R1], desc[UR2][R4.64] ;
        /*0070*/                   LDG.E.64 R8, desc[UR2][R4.64] ;
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0090*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*00b0*/               @P2 BRA `(.L_x_inner) ;
        /*00c0*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*00d0*/               @P3 BRA `(.L_x_outer) ;
.L_x_done:
        /*00e0*/                   STG.E.128 desc[UR2][R4.64], R8 ;
        /*00f0*/                   EXIT ;
.L_x_wait:
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R5 ;
        /*0110*/              @!P1 BRA `(.L_x_wait) ;
        /*0120*/                   BRA `(.L_x_go) ;
.L_x_end:
        /*0130*/                   BRA `(.L_x_end);
"""


def names(code):
    return [instruction.name for instruction in code]


def test_main_loop_is_the_innermost_with_the_most_products():
    code = sass.main_loop(sass.parse(LISTING))
    assert len(code) == 9  # from the wait to the back edge; the retry behind the end does not count
    assert names(code)[0] == "SYNCS.PHASECHK.TRANS64.TRYWAIT"
    assert names(code)[-1] == "BRA"


def test_loops_close_by_dominance():
    blocks = sass.parse(LISTING)
    loops = sass.natural_loops(blocks)
    assert len(loops) == 4  # inner, outer, retry, and the endless loop that pads the kernel
    holding = [m for _, _, m in loops if any("HGMMA" in i.name for n in m for i in blocks[n].instructions)]
    inner = min(holding, key=len)
    retry = [n for n, block in enumerate(blocks) if any(i.name.startswith("SYNCS") for i in block.instructions)]
    assert len(retry) == 2
    assert set(retry) <= inner  # the retry belongs to the loop that waits


def test_counts_in_the_loop():
    code = sass.main_loop(sass.parse(LISTING))
    assert sass.products(code) == (2 * 2 * 64 * 128 * 16, 2 * 64.0)
    assert sass._widths(code) == {"128": 1, "32": 1}
    assert sass._narrow(code, "LDGSTS", "LDG") == 2
    assert sass._in_flight(code) == 1


def test_tf32_takes_twice_as_long_as_it_says():
    half = sass.products([sass.Instruction("", "HGMMA.64x128x16.F32.BF16", "")])
    tf32 = sass.products([sass.Instruction("", "HGMMA.64x128x8.F32.TF32", "")])
    assert half[1] == tf32[1]
    assert half[0] == 2 * tf32[0]
    assert sass.products([sass.Instruction("", "HMMA.16816.F32.BF16", "")]) == (2 * 16 * 8 * 16, 8.0)


def test_no_loop_without_products():
    text = LISTING.replace("HGMMA", "FFMA")
    assert sass.main_loop(sass.parse(text)) == []


TTGIR = """
  tt.func public @kernel() {
    %0 = ttg.convert_layout %1 : tensor<64x64xf32, #a> -> tensor<64x64xf32, #b>
    %2:2 = scf.for %i = %c0 to %c9 step %c1 iter_args(%acc = %cst) -> (tensor<64x64xf32, #mma>)  : i32 {
      %3 = ttg.convert_layout %4 : tensor<64xi32, #a> -> tensor<64xi32, #b>
      %5 = scf.if %6 -> (i32) {
        %7 = ttg.convert_layout %8 : tensor<64x64xf16, #a> -> tensor<64x64xf16, #b>
        scf.yield %9 : i32
      } else {
        scf.yield %9 : i32
      }
      %11 = ttg.convert_layout %12 : tensor<64x64xf16, #a> -> tensor<64x64xf16, #b>
      %10 = ttng.warp_group_dot %a, %b, %acc {isAsync = true} : !ttg.memdesc<64x64xf16> -> tensor<64x64xf32, #mma>
      scf.yield %10 : tensor<64x64xf32, #mma>
    }
    %11 = ttg.convert_layout %2 : tensor<64x64xf32, #mma> -> tensor<64x64xf32, #b>
  }
"""


def test_conversions_are_counted_in_the_loop_alone():
    assert sass.ttgir_conversions(TTGIR) == 1  # that in the "if" is not done in each step
    assert sass.ttgir_conversions(TTGIR.replace("ttng.warp_group_dot", "arith.addf")) == 0


def test_amd_loop():
    text = """
kernel:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:
\ts_nop 0
\ts_cbranch_scc1 .LBB0_1
.LBB0_2:
\tds_read_b128 v[0:3], v4
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\ts_cbranch_scc0 .LBB0_2
\ts_endpgm
"""
    code = gcn.main_loop(text)
    assert code == ["ds_read_b128", "v_mfma_f32_32x32x8_bf16", "s_cbranch_scc0"]


FLAT = """
kernel:
.text.kernel:
        /*0000*/                   MOV R2, R3 ;
.L_x_step:
        /*0010*/               @P0 BRA `(.L_x_same) ;
        /*0020*/                   LDG.E R5, desc[UR2][R4.64] ;
        /*0030*/                   STS [R1], R5 ;
.L_x_same:
        /*0040*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/               @P1 BRA `(.L_x_next) ;
        /*0070*/                   STS [R1], R24 ;
        /*0080*/                   STG.E.128 desc[UR2][R4.64], R8 ;
.L_x_next:
        /*0090*/               @P2 BRA `(.L_x_step) ;
        /*00a0*/                   EXIT ;
"""


def test_what_is_done_between_two_tiles_is_no_part_of_a_step():
    """A flat kernel has it in its one loop, under a condition."""
    code = sass.main_loop(sass.parse(FLAT))
    assert [name.split(".")[0] for name in names(code)] == ["BRA", "UTMALDG", "HGMMA", "BRA", "BRA"]
    always = FLAT.replace("@P1 BRA `(.L_x_next)", "MOV R6, R7")
    assert "STS" in names(sass.main_loop(sass.parse(always)))
