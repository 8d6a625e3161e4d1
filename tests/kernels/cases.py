"""Every Triton kernel as the engine launches it, for test_compile.py."""

from compiling import Case


def _quantise(dtype: str, rank: int, backward: bool) -> Case:
    """Of x with A (R, K), or backward of dy with the weight's scales and B (N, R)."""
    types = {"rows": f"*{dtype}", "values": "*i8", "scales": "*fp32", "scaling": "fp32", "num_rows": "i32", "length": "i32",
             "rank": "i32"}
    types |= {"fold": "*fp32"} if backward else {}
    types |= {"factor": "*fp32", "projected": f"*{dtype}"} if rank else {}
    wide, unit = ("factor_stride_l", "factor_stride_r") if backward else ("factor_stride_r", "factor_stride_l")
    constexprs = {"GROUP": 128, "RANK": rank, unit: 1} | {name: None for name in ("fold", "factor", "projected")
                                                          if name not in types}
    return Case("lora_linear_int8.quantise_kernel", "int8_quantise" if rank < 32 else "int8_quantise_high_rank",
                types | {wide: "i32"}, constexprs, ("num_rows", "length", "rank", wide), tensor_cores=rank > 0, first=80)


def _multiply(dtype: str, rank: int, backward: bool, tiles: str = "", bias: bool = True, even_rows: bool = True,
              even: bool = True) -> Case:
    """y with B (N, R), or backward dX with A (R, K). Rows are a multiple of 16 except for words: 77."""
    types = {"left": "*i8", "left_scales": "*fp32", "weight": "*i8", "out": f"*{dtype}", "scaling": "fp32",
             "num_rows": "i32", "num_columns": "i32", "length": "i32", "rank": "i32"}
    types |= {} if backward else {"weight_scales": "*fp32"} | ({"bias": f"*{dtype}"} if bias else {})
    types |= {"down": f"*{dtype}", "up": "*fp32"} if rank else {}
    wide, unit = ("up_stride_r", "up_stride_c") if backward else ("up_stride_c", "up_stride_r")
    constexprs = {"GROUP": 128, "RANK": rank, "EVEN": even, unit: 1}
    constexprs |= {name: None for name in ("weight_scales", "bias", "down", "up") if name not in types}
    aligned = ("num_columns", "length", "rank", wide) + ("num_rows",) * even_rows
    return Case("lora_linear_int8.multiply_kernel", f"int8_multiply{tiles}", types | {wide: "i32"}, constexprs, aligned,
                tensor_cores=True, first=80)


def _nf4(dtype: str) -> Case:
    return Case("lora_linear_nf4.dequantise_kernel", "nf4_dequantise",
                {"codes": "*u8", "block_codes": "*u8", "group_ranges": "*fp32", "table": "*fp32", "out": f"*{dtype}",
                 "num_weights": "i32"}, {"NF4_BLOCK": 64, "NF4_GROUP": 256}, ("num_weights",))


CASES: list[Case] = [
    *(_quantise(dtype, rank, backward) for dtype, rank, backward in (
        ("bf16", 0, False), ("bf16", 0, True), ("bf16", 16, False), ("fp16", 16, True), ("fp16", 32, False),
        ("bf16", 64, True), ("bf16", 128, False), ("fp16", 128, True))),
    *(_multiply(dtype, rank, backward) for dtype, rank, backward in (
        ("bf16", 0, False), ("bf16", 16, False), ("bf16", 16, True), ("fp16", 16, False), ("bf16", 128, False),
        ("fp16", 128, True))),
    _multiply("bf16", 16, False, "_small", bias=False, even_rows=False),
    _multiply("fp16", 128, True, "_small"),
    _multiply("bf16", 16, False, "_small", even=False),  # of the time, 320 wide
    Case("lora_linear_int8.transpose_kernel", "int8_transpose",
         {"matrix": "*i8", "out": "*i8", "num_rows": "i32", "num_columns": "i32"}, {}, ("num_rows", "num_columns"),
         first=80),
    _nf4("fp16"),
    _nf4("bf16"),
]
