"""Is a plan runnable, before anything is started or written? The launcher and the engine ask the same questions."""

from dataclasses import dataclass
from pathlib import Path

from crumb.profiles.base_model import BaseModel, check_vae, inspect_base_model
from crumb.profiles.dataset import Scan, scan_subsets
from crumb.profiles.errors import RequestError
from crumb.profiles.hardware import count_gpus, detect_gpu
from crumb.profiles.interview import check_scan
from crumb.profiles.lora_file import starting_findings
from crumb.profiles.plan import Plan
from crumb.profiles.plan_rules import missing_packages
from crumb.profiles.subsets import effective_subsets


@dataclass(frozen=True)
class Facts:
    """What the plan's paths turned out to hold."""

    base: BaseModel
    scan: Scan


def preflight(plan: Plan, on_progress=None, resumes: bool = False) -> Facts:
    """Looks at every file the plan names; RequestError for the first that won't do.

    What only the first step needs is not missed by a run that goes on from a checkpoint.
    """
    _check_device(plan)
    base = inspect_base_model(Path(plan.base_model))
    if base.prediction_type and base.prediction_type != plan.prediction_type:
        raise RequestError(f"prediction_type is {plan.prediction_type} but {base.path.name} is {base.prediction_type} "
                           f"({base.prediction_evidence}). Set prediction_type = \"{base.prediction_type}\" in [base].")
    if not base.has_vae and not plan.vae:
        raise RequestError(f"{base.path} has no VAE baked in. Set vae in [base] to an SDXL VAE file.")
    if plan.vae:
        check_vae(plan.vae)
    if not resumes:
        starting_findings(plan)
    for name in missing_packages(plan.trackers):
        raise RequestError(f"trackers names {name}, but its package is not installed. `pip install {name}`, or take it out of "
                           f"trackers in [output] of the plan.")
    scan = scan_subsets(effective_subsets(plan), on_progress=on_progress)
    check_scan(scan, plan.skip_broken)
    return Facts(base, scan)


def check_gpus(plan: Plan, wanted: int) -> None:
    """RequestError where this machine has fewer GPUs than a run is to be shared by."""
    there = count_gpus()
    if wanted == 1 or plan.device == "cpu" or wanted <= there:
        return
    have = "no GPU that answers" if there == 0 else f"only {there} GPU{'s' * (there > 1)} to use"
    raise RequestError(f"--gpus {wanted} asks for {wanted} GPUs, but this machine has {have}. Give a smaller number, look at "
                       f"`crumb doctor` and CUDA_VISIBLE_DEVICES, or see docs/parallel.md for several machines.")


def steps_of_several(num_processes: int, batch_size: int, accumulation: int) -> str:
    """What a run shared by several processes makes of the plan's steps."""
    pictures = batch_size * accumulation * num_processes
    return (f"{num_processes} processes share each step. Pictures per step = batch_size x gradient_accumulation_steps x "
            f"processes = {batch_size} x {accumulation} x {num_processes} = {pictures}. So the same steps show {num_processes} "
            f"times the pictures: divide steps by {num_processes} for as many as one process would see.")


def _check_device(plan: Plan) -> None:
    if plan.device == "cpu":
        return
    gpu = detect_gpu()
    if gpu:
        if plan.mixed_precision == "bf16" and not gpu.has_bf16:
            raise RequestError(f"The plan says mixed_precision = \"bf16\", which {gpu.name} does not have: it came with RTX "
                               f"30. Set it to \"fp16\" (guide: PREC-MIXED).")
        return
    if plan.device == "cuda":
        raise RequestError("The plan says device = \"cuda\", but no NVIDIA GPU answers here. Check the driver with `crumb "
                           "doctor`, or set device = \"cpu\" and mixed_precision = \"no\" in the plan.")
    if plan.mixed_precision == "fp16":
        raise RequestError("The plan says mixed_precision = \"fp16\", but there is no GPU here, and processors have no fast "
                           "fp16. Set mixed_precision = \"no\".")
