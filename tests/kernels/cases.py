"""Every Triton kernel as the engine launches it, for test_compile.py."""

from compiling import Case

CASES: list[Case] = [
]
