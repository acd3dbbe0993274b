"""What is read from the machine code of one kernel."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Facts:
    """Counts from machine code and metadata; those of the loop are of one step of the main loop, per warp.

    Attributes:
        registers: 32-bit registers a thread (vector registers on AMD).
        spills: loads and stores of local memory in the whole kernel (spilled registers on AMD).
        loop_spills: those of them in the main loop.
        shared: bytes of shared memory a program.
        warps: of a program.
        loop: instructions of the main loop; 0 where no loop holds a matrix instruction.
        mma: matrix instructions in the loop, by name without shape (HGMMA, HMMA, UTCHMMA, v_mfma).
        mma_flops: FLOPs that one of the instruction's issuers (a warp group for HGMMA, a warp for HMMA) issues in one
            step of the loop; 0 where the instruction does not tell its shape.
        tensor_cycles: cycles that those keep a tensor core busy; 0 where unknown.
        loads: asynchronous loads in the loop, by width in bits as text, or ``"tma"``.
        narrow_loads: loads in the loop of less than 128 bits, asynchronous or not.
        plain_loads: loads in the loop that wait in registers (not asynchronous).
        shared_stores: stores to shared memory in the loop.
        shared_loads: loads of shared memory in the loop.
        conversions: layout conversions in the loop of the compiler's intermediate code that holds the product.
        narrow_stores: stores to memory of less than 128 bits in the whole kernel.
        wide_stores: stores of 128 bits or by TMA.
        in_flight: products that may still run where the loop first waits for one; -1 where nothing waits.
        stages: buffers of the deepest operand in shared memory.
    """

    registers: int
    spills: int
    loop_spills: int
    shared: int
    warps: int
    loop: int
    mma: dict[str, int] = field(default_factory=dict)
    mma_flops: int = 0
    tensor_cycles: float = 0.0
    loads: dict[str, int] = field(default_factory=dict)
    narrow_loads: int = 0
    plain_loads: int = 0
    shared_stores: int = 0
    shared_loads: int = 0
    conversions: int = 0
    narrow_stores: int = 0
    wide_stores: int = 0
    in_flight: int = -1
    stages: int = 0
