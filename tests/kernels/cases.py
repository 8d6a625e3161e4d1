"""Every Triton kernel as the engine launches it, for test_compile.py."""

from compiling import Case

HALVES = ("fp16", "bf16")


def geglu_cases(dtype: str) -> list[Case]:
    """d is 2560 or 5120."""
    half, d = f"*{dtype}", ("d",)
    kept = {"codes": "*i8", "scales": "*fp16"}
    sizes, scale_block = {"d": "i32", "num_blocks": "i32"}, {"SCALE_BLOCK": 64}
    return [
        Case("geglu.forward_kernel", "geglu", {"projected": half, "h": half, "d": "i32"}, multiples_of_16=d),
        Case("geglu.backward_kernel", "geglu",
             {"dh": half, "projected": half, "d_projected": half, "h": half, "d": "i32"}, multiples_of_16=d),
        Case("geglu.forward_int8_kernel", "geglu int8",
             {"projected": half, "h": half, **kept, **sizes, "lowest_gate": "fp32", "largest_scale": "fp32"},
             scale_block, multiples_of_16=d),
        Case("geglu.backward_int8_kernel", "geglu int8", {"dh": half, **kept, "d_projected": half, "h": half, **sizes},
             scale_block, multiples_of_16=d),
    ]


def layer_norm_cases(dtype: str, width: int) -> list[Case]:
    """4096 rows of 640 or 1024 of 1280."""
    from crumb.kernels.launch import launch_for
    from crumb.kernels.layer_norm import tile_of

    half, tile = f"*{dtype}", tile_of(width, launch_for("layer_norm", (7, 5)))
    affine, statistics = {"weight": half, "bias": half}, {"mean": "*fp32", "rstd": "*fp32"}
    sizes, aligned = {"num_rows": "i32", "width": "i32"}, ("num_rows", "width")
    forward = {"x": half, "y": half, **statistics, **affine, **sizes, "eps": "fp32"}
    backward = {"dy": half, "x": half, "dx": half, **statistics, "weight": half, **sizes}
    return [
        Case("layer_norm.forward_kernel", "layer_norm", forward, {"KNOWN": False, **tile}, aligned),
        Case("layer_norm.forward_kernel", "layer_norm", forward, {"KNOWN": True, **tile}, aligned),
        Case("layer_norm.backward_kernel", "layer_norm", backward, {"add": None, **tile}, aligned),
        Case("layer_norm.backward_kernel", "layer_norm", {**backward, "add": half}, tile, aligned),
    ]


def group_norm_silu_cases(dtype: str, memory_format: str) -> list[Case]:
    """320 to 2560 channels in 32 groups; 1024, 4096 or 16384 positions."""
    half, fp32 = f"*{dtype}", "*fp32"
    one = "stride_channel" if memory_format == "channels_last" else "stride_position"
    strides = [name for name in ("stride_channel", "stride_position") if name != one]
    shape = dict.fromkeys(["num_channels", "num_positions", *strides], "i32")
    aligned = (*shape, "num_groups")
    groups = {"mean": fp32, "rstd": fp32, "weight": half, "bias": half, "num_groups": "i32", **shape}
    sums, apply = f"group_norm_silu sums {memory_format}", f"group_norm_silu apply {memory_format}"
    silu, tile_sums = {one: 1, "ACTIVATION": True}, {"means": fp32, "squares": fp32}
    return [
        Case("group_norm_silu.statistics_kernel", sums, {"x": half, **tile_sums, **shape}, {one: 1}, aligned),
        *(Case("group_norm_silu.forward_kernel", apply, {"x": half, "y": half, **groups}, silu | {"ACTIVATION": activation},
               aligned) for activation in (True, False)),
        Case("group_norm_silu.gradient_sums_kernel", sums,
             {"dy": half, "x": half, "sums": fp32, "product_sums": fp32, **groups}, silu, aligned),
        Case("group_norm_silu.backward_kernel", apply,
             {"dy": half, "x": half, "dx": half, "mean_gradient": fp32, "mean_product": fp32, **groups}, silu, aligned),
    ]


def group_norm_silu_merge_cases() -> list[Case]:
    counts = ("num_tiles", "num_channels", "num_groups", "num_positions")
    sizes, aligned = dict.fromkeys(counts, "i32"), counts[1:]
    groups = {"mean": "*fp32", "rstd": "*fp32"}
    return [
        Case("group_norm_silu.merge_statistics_kernel", "group_norm_silu merge",
             {"means": "*fp32", "squares": "*fp32", **groups, **sizes, "tile_size": "i32", "eps": "fp32"},
             multiples_of_16=(*aligned, "tile_size")),
        Case("group_norm_silu.merge_sums_kernel", "group_norm_silu merge",
             {"sums": "*fp32", "product_sums": "*fp32", "mean_gradient": "*fp32", "mean_product": "*fp32", **sizes},
             multiples_of_16=aligned),
    ]


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
             "num_rows": "i32", "num_columns": "i32", "length": "i32", "rank": "i32", "down_stride": "i32"}
    types |= {} if backward else {"weight_scales": "*fp32"} | ({"bias": f"*{dtype}"} if bias else {})
    types |= {"down": f"*{dtype}", "up": "*fp32"} if rank else {}
    wide, unit = ("up_stride_r", "up_stride_c") if backward else ("up_stride_c", "up_stride_r")
    constexprs = {"GROUP": 128, "RANK": rank, "EVEN": even, unit: 1}
    constexprs |= {name: None for name in ("weight_scales", "bias", "down", "up") if name not in types}
    aligned = ("num_columns", "length", "rank", "down_stride", wide) + ("num_rows",) * even_rows
    return Case("lora_linear_int8.multiply_kernel", f"int8_multiply{tiles}", types | {wide: "i32"}, constexprs, aligned,
                tensor_cores=True, first=80)


def _nf4(dtype: str) -> Case:
    return Case("lora_linear_nf4.dequantise_kernel", "nf4_dequantise",
                {"codes": "*u8", "block_codes": "*u8", "group_ranges": "*fp32", "table": "*fp32", "out": f"*{dtype}",
                 "num_weights": "i32"}, {"NF4_BLOCK": 64, "NF4_GROUP": 256}, ("num_weights",))


MOMENTS = {"m_ptr": "*i8", "v_ptr": "*u8", "m_scale_ptr": "*fp32", "v_scale_ptr": "*fp32"}
FLAT = {"p_ptr": "*fp32", **MOMENTS, "tensor_of_ptr": "*i32", "active_ptr": "*fp32", **dict.fromkeys(
    ("first_block", "num_blocks"), "i32")}
ADAMW = FLAT | {"g_ptr": "*fp32", "factor_ptr": "*fp32", "steps_ptr": "*fp32", **dict.fromkeys(
    ("rate", "keep", "weight1", "beta2", "weight2", "log_beta1", "log_beta2", "eps"), "fp32")}
PRODIGY_APPLY = FLAT | {"now_ptr": "*fp32", "decay": "fp32", "eps": "fp32"}
PRODIGY_MOMENTS = FLAT | {
    "g_ptr": "*fp32", "factor_ptr": "*fp32", "now_ptr": "*fp32", "s_ptr": "*i16", "p0_ptr": "*i16", "p0_scale_ptr": "*fp32",
    "first_block_of_ptr": "*i32", "first_slice_of_ptr": "*i32", "k_ptr": "*i32", "progress_ptr": "*fp32",
    "length_ptr": "*fp32", **dict.fromkeys(("decay", "beta1", "weight1", "beta2", "weight2", "beta3"), "fp32")}
IN_FP32 = {"m_ptr": "*fp32", "v_ptr": "*fp32", "s_ptr": "*fp32", "p0_ptr": "*fp32"}


def in_bits(bits: int, types: dict[str, str]) -> dict[str, str]:
    return types if bits == 8 else {name: IN_FP32.get(name, one) for name, one in types.items()}


CASES: list[Case] = [
    *(case for dtype in HALVES for case in geglu_cases(dtype)),
    *(case for dtype in HALVES for width in (640, 1280) for case in layer_norm_cases(dtype, width)),
    *(case for dtype in HALVES for memory_format in ("channels_last", "contiguous")
      for case in group_norm_silu_cases(dtype, memory_format)),
    *group_norm_silu_merge_cases(),
    *(_quantise(dtype, rank, backward) for dtype, rank, backward in (
        ("bf16", 0, False), ("bf16", 0, True), ("bf16", 16, False), ("fp16", 16, True), ("fp16", 32, False),
        ("bf16", 64, True), ("fp16", 64, False), ("bf16", 128, False), ("fp16", 128, True))),
    *(_multiply(dtype, rank, backward) for dtype, rank, backward in (
        ("bf16", 0, False), ("bf16", 16, False), ("bf16", 16, True), ("fp16", 16, False), ("bf16", 128, False),
        ("fp16", 128, True))),
    _multiply("bf16", 16, False, "_small", bias=False, even_rows=False),
    _multiply("fp16", 128, True, "_small"),
    _multiply("bf16", 16, False, "_small", even=False),  # widths that are no multiple of 128: of small bases
    Case("lora_linear_int8.transpose_kernel", "int8_transpose",
         {"matrix": "*i8", "out": "*i8", "num_rows": "i32", "num_columns": "i32"}, {}, ("num_rows", "num_columns"),
         first=80),
    _nf4("fp16"),
    _nf4("bf16"),
    *(Case("adamw_8bit._adamw_kernel", "adamw_8bit", in_bits(bits, ADAMW), {"EIGHT_BIT": bits == 8, "BLOCK": 256})
      for bits in (8, 32)),
    Case("adamw_8bit._adamw_kernel", "adamw_8bit", ADAMW | {"g_ptr": "*bf16"}, {"EIGHT_BIT": True, "BLOCK": 256}),
    *(Case("prodigy_8bit._moments_kernel", "prodigy_8bit_moments", in_bits(bits, PRODIGY_MOMENTS),
           {"SLICE": 11 if bits == 8 else 1, "EIGHT_BIT": bits == 8, "BLOCK": 256}) for bits in (8, 32)),
    *(Case("prodigy_8bit._apply_kernel", "prodigy_8bit_apply", in_bits(bits, PRODIGY_APPLY),
           {"EIGHT_BIT": bits == 8, "BLOCK": 256}) for bits in (8, 32)),
]
