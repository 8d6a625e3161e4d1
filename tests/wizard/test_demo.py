"""`crumb demo`: its plans are derived as for any set, and its before/after pairs are the first and last pictures."""

from types import SimpleNamespace

import pytest
from PIL import Image

from crumb.engine.run.demo import demo_folder, write_demo_base
from crumb.engine.run.directory import create_run
from crumb.profiles.interview import conclude
from crumb.wizard.dashboard.pictures import save_before_after
from crumb.wizard.demo import SAMPLE_SUBJECTS, plan_demo, sample_pairs


@pytest.mark.parametrize(("subject", "rank"), [("style", 128), ("character", 32)])
def test_demo_plans_are_derived_and_ask_for_what_the_style_set_lacks(tmp_path, subject, rank):
    interview = plan_demo(write_demo_base(tmp_path), demo_folder(subject), SimpleNamespace(subject=subject, steps=None))
    plan = interview.plan
    assert (plan.rank, plan.alpha, plan.resolution, plan.prediction_type) == (rank, rank / 2, 128, "epsilon")
    assert (plan.targets, plan.conv_rank, plan.conv_alpha) == ("attention+ff+conv", rank / 2, rank / 4)
    assert plan.sample_prompts == [f"crumbdemo, {name}" for name in SAMPLE_SUBJECTS[subject]]
    if subject == "style":
        assert not {name.replace(" ", "-") for name in SAMPLE_SUBJECTS[subject]} & {
            picture.path.stem for picture in interview.scan.pictures}
    # The same answers without the demo's prompts and length give the same values.
    interview.answers.overrides.clear()
    derived = conclude(interview.answers, interview.scan).plan
    assert {name for name in vars(plan) if getattr(plan, name) != getattr(derived, name)} <= {
        "sample_prompts", "created", "steps", "save_every", "judge_every", "sample_every", "sample_guidance"}


def test_before_and_after_are_the_first_and_the_last_picture_of_each_prompt(tmp_path):
    interview = plan_demo(write_demo_base(tmp_path), demo_folder("style"), SimpleNamespace(subject="style", steps="10"))
    assert interview.plan.steps == 10
    run = create_run("pairs", interview.toml())
    run.samples.mkdir(exist_ok=True)
    colours = {"step-000000-0": "red", "step-000005-0": "white", "step-000010-0": "blue", "step-000000-1": "red"}
    for name, colour in colours.items():
        Image.new("RGB", (32, 32), colour).save(run.samples / f"{name}.png")
    pairs = sample_pairs(run, ["sun", "cat"])
    assert [(label, before.stem, after.stem) for label, before, after in pairs] == [
        ("sun", "step-000000-0", "step-000010-0")]
    save_before_after(pairs, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.getpixel((sheet.width // 2, 30)) == (255, 0, 0)
        assert sheet.getpixel((sheet.width // 2, sheet.height - 15)) == (0, 0, 255)
