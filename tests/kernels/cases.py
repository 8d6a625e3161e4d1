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


CASES: list[Case] = [
    *(case for dtype in HALVES for case in geglu_cases(dtype)),
]
