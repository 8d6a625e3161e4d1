"""Where everything of a run lies and in which number format: decided before anything large is loaded."""

import gc
from dataclasses import dataclass

import torch

from crumb.profiles.base_model import BaseModel
from crumb.profiles.errors import RequestError
from crumb.profiles.fit import Fit
from crumb.profiles.plan import Plan

SMALL_UNET_PARAMETERS = 100_000_000
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """Device and number format of the base, and how the run lies in memory.

    LoRA weights, their gradients and optimizer states are on the same device.
    """

    device: torch.device
    dtype: torch.dtype
    fit: Fit = Fit()

    @property
    def encoder_dtype(self) -> torch.dtype:
        """For VAE and text encoders: SDXL's VAE overflows in fp16 (black pictures, NaN), so fp16 becomes fp32."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def describe(self) -> str:
        fit, dtype = self.fit, str(self.dtype).removeprefix("torch.")
        base = dtype if fit.quantize_base == "no" else f"{fit.quantize_base}, computed in {dtype}"
        kept = "kept in part as int8" if fit.int8_activations else "kept"
        activations = f"activations {kept}" + (f", recomputed in {len(fit.recomputed)} blocks" if fit.recomputed else "")
        streamed = f", {len(fit.streamed)} blocks streamed from host memory" if fit.streamed else ""
        return f"base in {base} on {self.device}, {activations}{streamed}"


def settle_torch(base: BaseModel, placement: Placement) -> None:
    """The same sums in the same order every time; and threads where they help."""
    if placement.device.type == "cuda":
        # cuBLAS reads its part (CUBLAS_WORKSPACE_CONFIG) from the environment that the launcher sets.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # else every torch.empty is one more launch
        torch.backends.cudnn.benchmark = False
    elif base.num_unet_parameters < SMALL_UNET_PARAMETERS:
        # Tiny layers gain 4 % from a second thread on a quiet machine and lose 200 % beside one busy process.
        torch.set_num_threads(1)


def free_memory() -> None:
    """Gives back what models that were just let go of have taken."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def choose_placement(plan: Plan) -> Placement:
    """What the plan says of device and formats; fitting.py adds how it fits. RequestError where the machine can't give it."""
    has_cuda = torch.cuda.is_available()
    if plan.device == "cuda" and not has_cuda:
        raise RequestError(f"The plan says device = \"cuda\", but torch {torch.__version__} sees no CUDA GPU here. Check the "
                           f"driver with `crumb doctor`, or set device = \"cpu\" (and mixed_precision = \"no\") in the plan.")
    device = torch.device("cuda" if has_cuda and plan.device != "cpu" else "cpu")
    dtype = DTYPES[plan.mixed_precision]
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] < 8:
        raise RequestError(f"The plan says mixed_precision = \"bf16\", which {torch.cuda.get_device_name()} does not have. "
                           f"Set it to \"fp16\" (guide: PREC-MIXED).")
    if device.type == "cpu" and dtype == torch.float16:
        raise RequestError("The plan says mixed_precision = \"fp16\", but this run is on the processor, which has no fast "
                           "fp16. Set mixed_precision = \"no\".")
    return Placement(device, dtype, Fit(plan.quantize_base, plan.int8_activations, micro_batch=plan.batch_size))
