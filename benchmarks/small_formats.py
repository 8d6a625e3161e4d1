"""What a base in int8 or NF4, activations in int8 and 8-bit optimizers cost in accuracy: the demo's style job, for real.

    python -P benchmarks/small_formats.py [--steps 500] [--arms int8 nf4 ...] [--out docs/small-formats.jsonl]

Each arm is a run of the engine with the derived plan and the named settings, sixteen pictures held out. A line an arm:
held-out loss (fixed noise and noise levels, the same in all arms) at each judging, as the run itself measured it; and of
the finished LoRA on the exact base, where it will be used. With Prodigy also the rate that it found.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from crumb.engine.run.demo import demo_folder, write_demo_base
from crumb.engine.run.directory import RunDirectory, create_run, read_state
from crumb.engine.run.events import read_events
from crumb.engine.run.launch import launch_engine
from crumb.profiles.answers import Answers
from crumb.profiles.interview import conclude
from crumb.profiles.paths import cache_dir
from crumb.wizard.commands import unused_name

PRODIGY = {"learning_rate": 1.0, "alpha": 16.0, "optimizer_args": {"decouple": True, "weight_decay": 0.01, "d_coef": 0.3,
                                                                   "use_bias_correction": True, "safeguard_warmup": True}}
ARMS = {
    "exact": {"optimizer": "AdamW"},
    "int8": {"optimizer": "AdamW", "quantize_base": "int8"},
    "nf4": {"optimizer": "AdamW", "quantize_base": "nf4"},
    "int8 activations": {"optimizer": "AdamW", "int8_activations": True},
    "AdamW8bit": {"optimizer": "AdamW8bit"},
    "int8, AdamW8bit": {"optimizer": "AdamW8bit", "quantize_base": "int8", "int8_activations": True},
    "Prodigy": {"optimizer": "Prodigy", **PRODIGY},
    "Prodigy8bit": {"optimizer": "Prodigy8bit", **PRODIGY},
}


def train(name: str, settings: dict) -> tuple[RunDirectory, list[dict]]:
    answers = Answers(images=str(demo_folder("style")), base=str(write_demo_base(cache_dir() / "demo")), subject="style",
                      trigger="crumbdemo", name=unused_name(name.replace(", ", "-").replace(" ", "-")),
                      overrides={"held_out_pictures": 16, "sample_every": 0, "save_every": 0, **settings})
    interview = conclude(answers)
    run = create_run(interview.plan.name, interview.toml())
    launch_engine(run).wait()
    if read_state(run)["state"] != "done":
        raise SystemExit(f"{name}: {read_state(run)['message']} ({run.log})")
    return run, read_events(run.events)[0]


def measure(name: str, steps: int) -> dict:
    started = time.monotonic()
    run, events = train(name, {"steps": steps, "judge_every": max(1, steps // 10), **ARMS[name]})
    seconds = time.monotonic() - started
    judged = {event["step"]: event["held_out_loss"] for event in events if event["type"] == "judged"}
    rates = {event["step"]: event["learning_rate"] for event in events if event["type"] == "step"}
    # A run that starts from the file and hardly moves measures it on the exact base before its first step.
    _, events = train(f"{name} on the exact base", {"start_from": str(run.result), "steps": 1, "learning_rate": 1e-9,
                                                    "optimizer": "AdamW"})
    on_exact = next(event["held_out_loss"] for event in events if event["type"] == "judged")
    found = {"rates": {step: rates[step] for step in judged if step}} if name.startswith("Prodigy") else {}
    return {"arm": name, "settings": ARMS[name], "steps": steps, "seconds": round(seconds, 1), "held_out_loss": judged,
            "on_exact_base": on_exact, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--at-once", type=int, default=2, help="how many runs share the processor")
    parser.add_argument("--out", type=Path, default=Path("docs/small-formats.jsonl"))
    options = parser.parse_args()
    with ThreadPoolExecutor(options.at_once) as pool, options.out.open("a") as file:
        for line in pool.map(lambda arm: measure(arm, options.steps), options.arms):
            print(f"{line['arm']:<20} held-out {list(line['held_out_loss'].values())[-1]:.4f}, on the exact base "
                  f"{line['on_exact_base']:.4f}, {line['seconds']:.0f} s", flush=True)
            file.write(json.dumps(line) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
