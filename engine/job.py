"""The main job, top to bottom: Plan -> Dataset -> Caches -> Model -> Network -> Placement -> Loop -> file."""

import json
import logging
import time
from dataclasses import asdict, replace
from functools import partial

import torch

from crumb.engine.assemble import Job, assemble
from crumb.engine.data.prepare import prepare
from crumb.engine.memory.check import check_fit
from crumb.engine.memory.fitting import fit_into_memory, one_rung_down, predicted_bytes
from crumb.engine.memory.placement import choose_placement, free_memory, settle_torch
from crumb.engine.model.selftest import settle_convolutions
from crumb.engine.network.metadata import lora_metadata, sidecar
from crumb.engine.network.save import save_lora
from crumb.engine.network.verify import verify_lora
from crumb.engine.run.control import catch_signals, progress_reporter, take_request
from crumb.engine.run.directory import RunDirectory, write_atomic
from crumb.engine.run.events import EventWriter
from crumb.engine.run.status import Status
from crumb.engine.sheet.over_time import draw_before_after, draw_over_time
from crumb.engine.train.checkpoint import (
    lora_in_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from crumb.engine.train.judge import judge
from crumb.engine.train.parallel import join_processes
from crumb.engine.train.sample import sample_pictures
from crumb.engine.train.trackers import finish_trackers, start_trackers, track
from crumb.profiles.errors import CrumbError
from crumb.profiles.plan import load_plan
from crumb.profiles.preflight import preflight
from crumb.profiles.sample_prompts import sample_prompts, texts_of
from crumb.profiles.verdict import best_of, verdict

log = logging.getLogger("crumb")


def run_job(run: RunDirectory, events: EventWriter, status: Status) -> int:
    """Works the run to its end, or to a stop on request; returns the exit code (0 done, 3 stopped)."""
    started = time.monotonic()
    plan = load_plan(run.plan)
    processes = join_processes(plan.device)
    # From here on the plan's accumulation is that of all processes: N of them are one that accumulates N times as much.
    plan = replace(plan, gradient_accumulation_steps=plan.gradient_accumulation_steps * processes.count)
    placement = processes.together(lambda: choose_placement(plan))
    events.emit("phase", phase="scan")
    status.update(phase="scan", steps=plan.steps)
    progress = partial(progress_reporter, run, events)
    facts = processes.together(lambda: preflight(plan, progress("scan"), resumes=run.has_checkpoints))

    settle_torch(facts.base, placement)
    processes.together(lambda: settle_convolutions(placement, lambda text: events.emit("warning", text=text)))
    status.update(phase="cache")
    training_set = processes.together(
        lambda: prepare(plan, facts.base, facts.scan, placement, events, progress, processes.share))

    job = Job(run, plan, facts.base, placement, training_set, processes, events, status)
    job.trackers = processes.together(lambda: start_trackers(plan, run) if processes.is_first else [])
    step = _train_where_it_fits(job)
    finish_trackers(job.trackers)
    is_stopped = step < plan.steps
    if processes.is_first and is_stopped:
        if not lora_in_checkpoint(run, step).exists():  # it may just have been saved
            _save(job, step)
        events.emit("stopped", step=step)
    elif processes.is_first:
        _finish(job, time.monotonic() - started)
    processes.leave()
    return 3 if is_stopped else 0


def _train_where_it_fits(job: Job) -> int:
    """Assembles and trains; where memory runs out, again with less, from the last finished step on. Returns that of the end."""
    job.placement, costs = job.processes.together(lambda: fit_into_memory(job.placement, job.plan, job.base, job.run))
    while True:
        try:
            step = assemble(job)
            _prove_fit(job, costs)
            return _train(job, step)
        except torch.OutOfMemoryError as error:
            log.warning("out of memory (phase %s)", job.status.phase, exc_info=True)
            reason = str(error)
        # Only here, outside of the handler, is nothing of what failed held any more.
        job.trainer = None
        free_memory()
        job.placement, costs = one_rung_down(job.placement, job.plan, job.base, job.run, reason, job.status.phase,
                                             job.status.step, job.events)
        if job.processes.count > 1:
            raise CrumbError(f"The GPU's memory ran out ({reason}). Several processes can't change their ways on the go: "
                             f"`crumb resume {job.run.name}` goes on with less ({costs[0]}).")


def _prove_fit(job: Job, costs: list[str]) -> None:
    """One pass of the largest pictures, and what it took beside what arithmetic had said."""
    job.status.update(phase="fit")
    predicted = None
    if job.placement.device.type == "cuda":
        job.events.emit("phase", phase="fit")
        predicted = predicted_bytes(job.placement, job.plan, job.base)
    job.events.emit("placement", placement=job.placement.describe(), costs=costs, predicted_bytes=predicted,
                    measured_bytes=check_fit(job.trainer))


def _train(job: Job, step: int) -> int:
    """Steps until the plan is fulfilled or somebody asks to stop; returns the last finished step."""
    trainer, events = job.trainer, job.events
    wants_stop = catch_signals()
    job.status.update(state="training", phase="train", step=step)
    events.emit("phase", phase="train")
    try:
        if job.processes.is_first:
            _make_up(job, step)
        while step < job.plan.steps:
            if job.processes.first_says(lambda: wants_stop() or take_request(job.run, "stop")):
                break
            job.processes.require_same_weights(step, trainer.network.parameters())
            fields = trainer.train_step(step)
            events.emit("step", **fields)
            _track(job, fields)
            step += 1
            job.status.update(step=step)
            if job.processes.is_first:  # the others wait for the next step's question
                _after_step(job, step)
    except torch.OutOfMemoryError:
        if job.processes.is_first:
            _keep(job, step)
        raise
    return step


def _make_up(job: Job, step: int) -> None:
    """What is due at a step before the next one is made, and has not been done."""
    if step == 0 and not job.history:
        _judge(job, 0)
        if job.plan.sample_every:
            _sample(job, 0)
    elif step and _is_judged(job, step) and all(judged.step != step for judged in job.history):
        _after_step(job, step)


def _is_judged(job: Job, step: int) -> bool:
    plan = job.plan
    return step == plan.steps or (plan.judge_every > 0 and step % plan.judge_every == 0)


def _keep(job: Job, step: int) -> None:
    """Puts what is learned so far on disk before it is let go of; gradients of a step that failed count for nothing."""
    job.trainer.optimizer.zero_grad(set_to_none=True)
    free_memory()
    if step and not lora_in_checkpoint(job.run, step).exists():
        _save(job, step)


def _after_step(job: Job, step: int) -> None:
    """Judges, saves and samples where it is time or was asked for."""
    plan, last = job.plan, step == job.plan.steps
    is_best = _judge(job, step) if _is_judged(job, step) else False
    if take_request(job.run, "save") or (not last and (is_best or (plan.save_every and step % plan.save_every == 0))):
        _save(job, step)
    if take_request(job.run, "sample") or (plan.sample_every and (step % plan.sample_every == 0 or last)):
        _sample(job, step)


def _track(job: Job, fields: dict) -> None:
    if job.trackers:
        track(job.trackers, fields, lambda text: job.events.emit("warning", text=text))


def _judge(job: Job, step: int) -> bool:
    """Measures on fixed noise and says how the run is going; returns whether this is the best step so far."""
    trainer = job.trainer
    job.status.update(phase="judge")
    job.events.emit("phase", phase="judge")
    job.history.append(judge(trainer, step))
    judged, is_best = job.history[-1], best_of(job.history) is job.history[-1]
    _track(job, asdict(judged))
    job.events.emit("judged", **asdict(judged), best=is_best, **asdict(verdict(job.history, job.plan.steps)))
    job.events.emit("phase", phase="train")
    job.status.update(phase="train")
    return is_best


def _save(job: Job, step: int) -> None:
    trainer = job.trainer
    job.status.update(state="saving")
    progress = {"loss_smoothed": trainer.loss_smoothed, "num_losses": trainer.num_losses,
                "judged": [asdict(judged) for judged in job.history]}
    folder = save_checkpoint(job.run, step, trainer.network, trainer.optimizer, trainer.scaler, job.belongs_to, progress,
                             job.plan.save_precision, _metadata(job, step))
    best = best_of(job.history)
    prune_checkpoints(job.run, job.plan.keep_checkpoints, best.step if best else None)
    job.events.emit("saved", step=step, path=str(folder.relative_to(job.run.path)), kind="checkpoint")
    job.status.update(state="training")


def _sample(job: Job, step: int) -> None:
    """Sample pictures are a help, not the job: what goes wrong here is told, and training goes on."""
    if not job.plan.sample_prompts:
        return
    status = job.status
    status.update(state="sampling", phase="sample")
    job.events.emit("phase", phase="sample")
    try:
        entries = job.trainer.prompt_entries(texts_of(sample_prompts(job.plan)))
        paths = sample_pictures(job.trainer.unet, entries, job.plan, job.base, job.placement,
                                job.run.samples, step)
        job.events.emit("sample", step=step, paths=[str(path.relative_to(job.run.path)) for path in paths])
        draw_over_time(job.run.samples, job.run.name, job.plan.sample_prompts)
    except (torch.OutOfMemoryError, OSError, CrumbError) as error:
        log.exception("sampling failed")
        job.events.emit("warning", text=f"Sampling at step {step} failed: {error}. Training goes on.")
    free_memory()
    job.events.emit("phase", phase="train")
    status.update(state="training", phase="train")


def _finish(job: Job, seconds: float) -> None:
    """Writes the LoRA file, reads it back, and lays beside it what other programs show with it."""
    run, plan = job.run, job.plan
    job.status.update(state="saving", phase="save")
    job.events.emit("phase", phase="save")
    save_lora(run.result, job.trainer.network, plan.save_precision, _metadata(job, plan.steps))
    report = verify_lora(run.result)
    if report.num_matched != len(job.trainer.network.layers) or report.problems:
        raise CrumbError(f"The saved file {run.result} did not pass its check: {'; '.join(report.problems)}. "
                         f"The checkpoints are kept.")
    write_atomic(run.result.with_suffix(".json"), json.dumps(sidecar(plan), ensure_ascii=False, indent=1).encode())
    draw_before_after(run.samples, run.name, plan.sample_prompts, plan.steps, run.result.with_suffix(".png"))
    job.events.emit("saved", step=plan.steps, path=run.result.name, kind="result")
    _keep_best(job)
    peak = torch.cuda.max_memory_reserved() if job.placement.device.type == "cuda" else None
    job.events.emit("finished", step=plan.steps, path=run.result.name, seconds=round(seconds, 1), vram_peak_bytes=peak)


def _keep_best(job: Job) -> None:
    """The file of the lowest held-out loss beside the last one, as NAME-best, where they are not the same."""
    best = best_of(job.history)
    if best is None or best.step == job.plan.steps or not lora_in_checkpoint(job.run, best.step).exists():
        return
    path = job.run.result.with_stem(f"{job.run.name}-best")
    write_atomic(path, lora_in_checkpoint(job.run, best.step).read_bytes())
    job.events.emit("saved", step=best.step, path=path.name, kind="best")


def _metadata(job: Job, step: int) -> dict[str, str]:
    training_set = job.training_set
    pictures, crops, captions = ([of_all[index] for index in (*training_set.trained, *training_set.regularization)]
                                 for of_all in (training_set.pictures, training_set.crops, training_set.captions))
    return lora_metadata(job.plan, training_set.base_sha256, pictures, crops, captions, step)
