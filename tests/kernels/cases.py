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


CASES: list[Case] = [
    *(case for dtype in HALVES for case in geglu_cases(dtype)),
    *(case for dtype in HALVES for width in (640, 1280) for case in layer_norm_cases(dtype, width)),
]
