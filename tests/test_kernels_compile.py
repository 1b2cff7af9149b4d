"""Kernels that the interpreter can run are compiled for a GPU too, which needs none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from predict_train.runtime.device.ggml_kernels import ggml_linear
from predict_train.runtime.device.shipped_kernels import fp8_linear, mxfp4_linear

POINTERS = {"x": "bf16", "output": "bf16", "biases": "bf16", "table": "i32", "memory": "u8", "codes": "u8"}
SIZES = {"IN": 2048, "OUT": 768, "GATED": True}
for kernel, numbers, constants in (
    (ggml_linear, "", {"IN": 2048, "OUT": 768, "KIND": 13, "UP": 14, "IN_DTYPE": True, "PARTS": 8, "PART": 2, "COLUMNS": 256}),
    (ggml_linear, "", {"IN": 2048, "OUT": 768, "KIND": 12, "UP": 3, "IN_DTYPE": False, "PARTS": 2, "PART": 8, "COLUMNS": 256}),
    (fp8_linear, "fp32", SIZES | {"ROWS": 16, "COLUMNS": 512, "HIGH": 128, "WIDE": 128}),
    (mxfp4_linear, "u8", SIZES | {"GROUP": 32, "ROWS": 32, "GROUPS": 4}),
):
    kinds = {name: "*" + kind for name, kind in (POINTERS | {"numbers": numbers}).items()}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    found = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    print(len(found.asm["cubin"]) > 0)
"""


def test_kernels_over_shipped_blocks_compile_for_a_gpu(tmp_path: Path) -> None:
    """In a process of its own, since the interpreter is chosen when Triton is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[1],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["True"] * 4, done.stderr
