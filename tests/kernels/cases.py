"""Every Triton kernel as the engine launches it, for test_compile.py."""

from compiling import Case

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
    *(Case("adamw_8bit._adamw_kernel", "adamw_8bit", in_bits(bits, ADAMW), {"EIGHT_BIT": bits == 8, "BLOCK": 256})
      for bits in (8, 32)),
    Case("adamw_8bit._adamw_kernel", "adamw_8bit", ADAMW | {"g_ptr": "*bf16"}, {"EIGHT_BIT": True, "BLOCK": 256}),
    *(Case("prodigy_8bit._moments_kernel", "prodigy_8bit_moments", in_bits(bits, PRODIGY_MOMENTS),
           {"SLICE": 11 if bits == 8 else 1, "EIGHT_BIT": bits == 8, "BLOCK": 256}) for bits in (8, 32)),
    *(Case("prodigy_8bit._apply_kernel", "prodigy_8bit_apply", in_bits(bits, PRODIGY_APPLY),
           {"EIGHT_BIT": bits == 8, "BLOCK": 256}) for bits in (8, 32)),
]
