"""Two real processes over gloo, started as `crumb train --gpus 2` starts them, against one with twice the accumulation."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from crumb.engine.run.belonging import belongs_to_another, plan_digest
from crumb.engine.run.directory import RunDirectory, create_run, engine_is_alive, read_state
from crumb.engine.run.events import read_events
from crumb.engine.run.processes import accelerate_command
from crumb.engine.train.parallel import Processes
from crumb.profiles import preflight
from crumb.profiles.errors import RequestError

STEPS = 3
NAN_STEP = 1

RECORDER = f'''
import json, os, sys
from pathlib import Path
from safetensors.torch import save_file
from crumb.engine import __main__ as engine
from crumb.engine.data import caches
from crumb.engine.train import loop

folder, rank = Path(os.environ["RECORDS"]), os.environ.get("RANK", "0")
seen, real_apply, real_write, real_draw = [0], loop.Trainer._apply_gradients, caches.write_entry, loop.draw

def apply(trainer, loss):
    gradients = {{str(n): p.grad.clone() for n, p in enumerate(trainer.network.parameters())}}
    norm = real_apply(trainer, loss)
    weights = {{f"weight {{n}}": p.detach().clone() for n, p in enumerate(trainer.network.parameters())}}
    save_file(gradients | weights, folder / f"{{rank}}-{{seen[0]}}.safetensors")
    seen[0] += 1
    return norm

def write(path, tensors):
    with open(folder / "entries", "a") as file:
        print(rank, path, file=file)
    real_write(path, tensors)

def draw(batch, plan, schedule, scaling_factor, generator):
    noisy, target, timesteps = real_draw(batch, plan, schedule, scaling_factor, generator)
    second_pass = loop.step_generator(plan.seed, {NAN_STEP}, 1).initial_seed()
    return noisy, target * float("nan") if generator.initial_seed() == second_pass else target, timesteps

loop.Trainer._apply_gradients, caches.write_entry, loop.draw = apply, write, draw
sys.exit(engine.main(sys.argv[1:]))
'''


def crumb(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-P", "-m", "crumb.wizard", *map(str, arguments)], capture_output=True, text=True,
                          check=False)


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-P", "-m", "crumb.wizard", *map(str, arguments), "--plain"],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def last_step(run: RunDirectory) -> int:
    return max((event["step"] for event in read_events(run.events)[0] if event["type"] == "step"), default=0)


def wait_for_step(run: RunDirectory, step: int, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while last_step(run) < step:
        assert time.monotonic() < deadline, f"waited too long for step {step}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def plan(tiny_base, photographs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.toml"
    settings = {"steps": STEPS, "rank": 4, "sample_every": 0, "save_every": 1000, "judge_every": 0, "held_out_pictures": 0,
                "batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": "1e-3", "save_precision": "float",
                "network_dropout": 0.1, "optimizer": "AdamW8bit"}
    done = crumb("plan", "--images", photographs, "--base", tiny_base, "--subject", "style", "--gpu", "cpu", "--trigger", "par",
                 *[word for name, value in settings.items() for word in ("--set", f"{name}={value}")], "--out", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def recorded(plan, tmp_path_factory) -> dict[int, RunDirectory]:
    """The same run by one process and by two, with every gradient kept; one pass of step NAN_STEP gives NaN."""
    runs = {}
    for count in (1, 2):
        folder = tmp_path_factory.mktemp(f"by-{count}")
        text = plan.read_text().replace("gradient_accumulation_steps = 1", f"gradient_accumulation_steps = {2 // count}")
        runs[count] = run = create_run("par", text, folder)
        script = folder / "recorder.py"
        script.write_text(RECORDER)
        command = accelerate_command(run, 2)[: -len(["-m", "crumb.engine", "RUN"])] if count == 2 else [sys.executable, "-P"]
        done = subprocess.run([*command, str(script), str(run.path)], capture_output=True, text=True, check=False,
                              env=os.environ | {"RECORDS": str(folder), "CRUMB_CACHE": str(folder / "cache")})
        assert done.returncode == 0, done.stderr[-3000:]
    return runs


def record(run: RunDirectory, rank: int, step: int) -> dict[str, torch.Tensor]:
    return load_file(run.path.parent / f"{rank}-{step}.safetensors")


def test_two_processes_give_the_gradients_of_one_with_twice_the_accumulation(recorded):
    """Bit for bit, with dropout: two numbers have only one sum. A NaN in one process drops the step in both."""
    for step in range(STEPS):
        expected = record(recorded[1], 0, step)
        for rank in (0, 1):
            found = record(recorded[2], rank, step)
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor) or (tensor.isnan().any() and found[name].isnan().any()), (step, name)
    first, last = record(recorded[1], 0, 0), record(recorded[1], 0, STEPS - 1)
    assert any(not torch.equal(first[name], last[name]) for name in first if name.startswith("weight"))
    assert recorded[2].result.read_bytes() == recorded[1].result.read_bytes()


def test_one_process_writes_and_tells_what_a_step_holds(recorded):
    told = {count: read_events(run.events)[0] for count, run in recorded.items()}
    for events in told.values():
        assert [event["step"] for event in events if event["type"] == "step"] == list(range(1, STEPS + 1))
        assert [event["step"] for event in events if event.get("skipped")] == [NAN_STEP + 1]
        assert [event["type"] for event in events].count("finished") == 1
    for name in ("loss", "loss_smoothed", "grad_norm", "learning_rate", "epoch"):
        one, two = ([event[name] for event in told[count] if event["type"] == "step"] for count in (1, 2))
        assert one == two, name
    (numbers,) = [event for event in told[2] if event["type"] == "numbers"]
    assert (numbers["num_processes"], numbers["pictures_per_step"]) == (2, 2)
    assert any(event["type"] == "warning" and "divide steps by 2" in event["text"] for event in told[2])


def test_each_cache_entry_is_made_once_and_both_take_part(recorded):
    by_one, by_two = ([line.split() for line in (recorded[count].path.parent / "entries").read_text().splitlines()]
                      for count in (1, 2))
    assert sorted(Path(path).name for _, path in by_two) == sorted(Path(path).name for _, path in by_one)
    for kind, least in (("/latents/", 3), ("/prompts/", 3)):
        ranks = [rank for rank, path in by_two if kind in path]
        assert min(ranks.count("0"), ranks.count("1")) >= least, ranks


def test_stop_resume_and_a_killed_process(plan, tmp_path):
    """Stop: both at the same step, exit code 3. Killed: the other one ends too, and the run can be resumed."""
    long_plan = tmp_path / "long.toml"
    long_plan.write_text(plan.read_text().replace(f"steps = {STEPS}\n", "steps = 400\n"))
    run = RunDirectory(tmp_path / "runs" / "par")
    process = start("train", long_plan, "--gpus", "2")
    wait_for_step(run, 2)
    assert crumb("stop", "par").returncode == 0
    assert process.wait(60) == 3, process.stdout.read()
    events = read_events(run.events)[0]
    stopped_at = next(event["step"] for event in events if event["type"] == "stopped")
    assert [event["step"] for event in events if event["type"] == "step"] == list(range(1, stopped_at + 1))
    assert [folder.name for folder in run.checkpoints.iterdir()] == [f"step-{stopped_at:06d}"]

    process = start("resume", "par", "--gpus", "2")
    wait_for_step(run, stopped_at + 2)
    workers = {worker.environ()["RANK"]: worker for worker in psutil.Process(process.pid).children(recursive=True)
               if worker.cmdline()[-3:-1] == ["-m", "crumb.engine"] and "RANK" in worker.environ()}
    assert sorted(workers) == ["0", "1"] and read_state(run)["pid"] == workers["0"].pid
    assert all(worker.cmdline()[1] == "-P" for worker in workers.values())
    workers["1"].send_signal(signal.SIGKILL)
    assert process.wait(60) == 1
    assert not engine_is_alive(run) and not workers["0"].is_running()
    state = read_state(run)
    assert state["state"] in ("failed", "lost"), state
    if state["state"] == "failed":
        assert "Another process" in state["message"], state


def test_a_gradient_that_is_missing_in_one_process_counts_as_zero(trainer, monkeypatch):
    """Module dropout leaves layers out of a pass; what is missing everywhere stays missing."""
    settings = {"module_dropout": 0.5, "batch_size": 1}
    alone = trainer(gradient_accumulation_steps=4, **settings)
    alone.network.train(True)
    alone._accumulate_gradients(0)
    expected = [parameter.grad for parameter in alone.network.parameters()]
    halves = []
    for rank in (0, 1):
        half = trainer(gradient_accumulation_steps=4, **settings)
        half.processes = Processes(rank, 2, rank, 2)
        monkeypatch.setattr(Processes, "add_up", lambda self, parameters, *numbers: list(numbers))
        half.network.train(True)
        half._accumulate_gradients(0)
        halves.append([parameter.grad for parameter in half.network.parameters()])
    assert any(a is None for half in halves for a in half)
    monkeypatch.undo()
    parameters = alone.network.parameters()
    for parameter, gradient in zip(parameters, halves[0]):
        parameter.grad = gradient

    def add_the_other_half(flat):
        if flat.dtype != torch.float64:
            flat += torch.cat([*((torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, halves[1])),
                               torch.tensor([float(g is not None) for g in halves[1]])])

    monkeypatch.setattr("crumb.engine.train.parallel.distributed.all_reduce", add_the_other_half)
    Processes(0, 2).add_up(parameters, 1.0)
    for parameter, gradient in zip(parameters, expected):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-8)


def test_more_gpus_than_there_are_is_a_sentence(make_plan, monkeypatch):
    monkeypatch.setattr(preflight, "count_gpus", lambda: 1)
    with pytest.raises(RequestError, match="only 1 GPU to use"):
        preflight.check_gpus(make_plan(device="auto"), 2)
    preflight.check_gpus(make_plan(device="cpu"), 2)
    preflight.check_gpus(make_plan(device="auto"), 1)


def test_a_checkpoint_belongs_to_a_number_of_passes_whoever_makes_them(make_plan):
    """Two processes that make two passes each go on with what four made with one; run_job multiplies."""
    assert plan_digest(make_plan(gradient_accumulation_steps=2 * 2)) == plan_digest(
        make_plan(gradient_accumulation_steps=1 * 4))
    assert plan_digest(make_plan(gradient_accumulation_steps=2)) != plan_digest(make_plan())
    assert "number of GPUs" in str(belongs_to_another("plan.toml"))


def test_what_differs_between_machines_is_named(make_plan, monkeypatch):
    two = Processes(0, 2, 0, 1)
    monkeypatch.setattr(Processes, "_gather", lambda self, value: [value, {**value, "base model": "b"}])
    with pytest.raises(RequestError, match="The base model is not the same"):
        two.require_same({"plan.toml": "p", "base model": "a"})
    monkeypatch.setattr(Processes, "_gather", lambda self, value: [value, value])
    two.require_same({"plan.toml": "p", "base model": "a"})
    assert replace(two, rank=1).share == (0, 1), "alone on its machine it encodes everything"
