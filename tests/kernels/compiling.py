"""Compiles Triton kernels ahead of time for GPUs that are not there, and reads what they take off the result.

A process of its own runs this file: TRITON_INTERPRET, under which the other tests run, makes kernels that can't be
compiled. Prints one JSON object a line.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

ARCHITECTURES = (75, 80, 86, 89, 90, 120)
POINTERS = ("*fp16", "*bf16", "*fp32", "*i8", "*u8", "*i16", "*i32", "*i64", "*u16")


@dataclass(frozen=True)
class Case:
    """One kernel with the types of its arguments; constexprs beyond those of the launch configuration.

    `kernel` is module.function below crumb.kernels. All pointers are taken as aligned to 16 bytes, and so are the
    integers named in `multiples_of_16`, as Triton finds them at a launch.
    """

    kernel: str
    config: str
    types: dict[str, str]
    constexprs: dict = field(default_factory=dict)
    multiples_of_16: tuple[str, ...] = ()
    tensor_cores: bool = False
    first: int = 75

    @property
    def name(self) -> str:
        return " ".join([self.kernel, *self.types.values(), *(f"{key}={value}" for key, value in self.constexprs.items())])


@dataclass(frozen=True)
class Compiled:
    name: str
    architecture: int
    shared_bytes: int
    num_registers: int
    spill_bytes: int
    num_mma: int
    wants_mma: bool


def compile_case(case: Case, architecture: int) -> Compiled:
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from crumb.kernels.launch import launch_for

    module, _, function = case.kernel.rpartition(".")
    kernel = getattr(importlib.import_module(f"crumb.kernels.{module}"), function)
    launch = launch_for(case.config, divmod(architecture, 10))
    constants = {**launch.blocks, **case.constexprs}
    names = kernel.arg_names
    missing = set(names) - constants.keys() - case.types.keys()
    assert not missing, f"{case.name}: no type for {sorted(missing)}"
    aligned = [i for i, name in enumerate(names)
               if case.types.get(name) in POINTERS or name in case.multiples_of_16]
    source = ASTSource(
        kernel, signature={name: case.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned})
    done = compile(source, target=GPUTarget("cuda", architecture, 32),
                   options={"num_warps": launch.num_warps, "num_stages": launch.num_stages})
    num_registers, spill_bytes = _resources(done.asm["cubin"])
    mma = len(re.findall(r"mma\.sync|wgmma\.mma_async", done.asm["ptx"]))
    return Compiled(case.name, architecture, done.metadata.shared, num_registers, spill_bytes, mma, case.tensor_cores)


def _resources(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", told)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from cases import CASES

    for case in CASES:
        for architecture in ARCHITECTURES:
            if architecture >= case.first:
                print(json.dumps(asdict(compile_case(case, architecture))), flush=True)
