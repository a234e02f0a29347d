"""Compile a recorded launch ahead of time, without a GPU, and read what the machine code needs.

Works only where Triton does not interpret. The signature is the one a real launch would have:
integers that are 1 or multiples of 16 and aligned pointers are specialised as Triton's launcher
does it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unival.kernels.triton_tools.launch import Launch

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Chip:
    """Limits of a chip and its datasheet ceilings (dense, no sparsity)."""

    name: str
    arch: int
    multiprocessors: int
    shared_per_block: int  # bytes a block may ask for
    shared_per_multiprocessor: int  # bytes
    bandwidth: float  # bytes/s
    l2: int  # bytes
    tensor_flops: float  # 16-bit, per second
    float32_flops: float  # per second


CHIPS = {
    80: Chip("A100", 80, 108, 166_912, 167_936, 2.039e12, 40 << 20, 312e12, 19.5e12),
    90: Chip("H100", 90, 132, 232_448, 233_472, 3.35e12, 50 << 20, 989e12, 67e12),
    100: Chip("B200", 100, 148, 232_448, 233_472, 8.0e12, 126 << 20, 2250e12, 80e12),
}
REGISTERS, WARPS, BLOCKS = 65_536, 64, 32  # of a multiprocessor, on all three


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes. Instructions are counted in the code, not as executed."""

    arch: int
    registers: int
    stack: int  # bytes a thread; spilled registers live here
    spills: int  # loads and stores of spilled registers
    shared: int  # bytes a block
    occupancy: float  # resident warps / possible warps, by registers, shared memory and block limit
    hmma: int  # tensor-core instructions of sm_80
    hgmma: int  # of sm_90
    utcmma: int  # of sm_100
    loads: int  # from global memory, asynchronous copies to shared memory included
    loads_128: int  # of those, 128 bits a thread
    stores: int
    stores_128: int

    @property
    def fits(self) -> bool:
        return (
            not self.spills and not self.stack and self.shared <= CHIPS[self.arch].shared_per_block
        )


def specialization(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict]:
    """Signature, constants and attributes of the code a launch would run."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[name] = "constexpr"
            constants[name] = value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            # torch's allocator aligns to 512 bytes; a view may start anywhere.
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, bool):
            signature[name], aligned = "i1", False
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[name], aligned = "fp32", False
        if aligned and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def launch_key(launch: Launch) -> str:
    """What distinguishes the code of a launch from that of others, architecture aside."""
    signature, constants, attributes = specialization(launch)
    name = f"{launch.kernel.__module__}.{launch.kernel.__name__}"
    code = (signature, constants, attributes, launch.config)
    return f"{name} {code}"


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile for an architecture (80, 90 or 100) and take the machine code apart."""
    signature, constants, attributes = specialization(launch)
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _dissect(kernel.asm["cubin"], kernel.metadata.shared, arch, launch.config.num_warps)


def _dissect(cubin: bytes, shared: int, arch: int, num_warps: int) -> Resources:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage!r}")
    registers, stack = int(found[1]), int(found[2])
    operations = Counter(
        re.findall(r"^\s*(?:/\*\w+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", code, re.M)
    )

    def count(pattern: str) -> int:
        return sum(n for name, n in operations.items() if re.match(pattern, name))

    return Resources(
        arch=arch,
        registers=registers,
        stack=stack,
        spills=count(r"LDL\b") + count(r"STL\b"),
        shared=shared,
        occupancy=occupancy(registers, shared, num_warps, arch),
        hmma=count(r"HMMA\b"),
        hgmma=count(r"HGMMA\b"),
        utcmma=count(r"UTC\w*MMA"),
        loads=count(r"LDG(STS)?\b"),
        loads_128=count(r"LDG(STS)?\b.*\.128"),
        stores=count(r"STG\b"),
        stores_128=count(r"STG\b.*\.128"),
    )


def _output(program: Path, *arguments: str) -> str:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def occupancy(registers: int, shared: int, num_warps: int, arch: int) -> float:
    """Resident warps over the possible 64, by the limits of the chip's multiprocessors.

    Registers are handed out in units of 256 a warp; a block takes 1 KiB of shared memory for the
    system besides its own.
    """
    chip = CHIPS[arch]
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        REGISTERS // (per_warp * num_warps),
        chip.shared_per_multiprocessor // (shared + 1024),
        WARPS // num_warps,
        BLOCKS,
    )
    return blocks * num_warps / WARPS


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; broadcast dimensions count once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()
