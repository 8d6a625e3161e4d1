"""Triton where it is installed, and names that let the kernels' files be imported where it is not."""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
except Exception:  # not there, or broken: a package that does not match its driver raises anything
    triton, tl = None, SimpleNamespace(constexpr=None)


def jit(function):
    """triton.jit; compiles nothing before the first launch."""
    return triton.jit(function) if triton else function


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
