"""Files that hold kohya's settings: refusals in words, dataset files, prompts, nonsense."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crumb.profiles.answers import Answers
from crumb.profiles.errors import RequestError
from crumb.profiles.kohya.importing import answers_of, translate
from crumb.profiles.kohya.reading import read_settings
from crumb.profiles.kohya.table import KNOWN_KEYS, TABLE
from crumb.profiles.kohya.values import Untaken
from crumb.profiles.plan import plan_fields

PRESET = json.loads((Path(__file__).parent / "kohya_preset.json").read_text())
"""The keys of a kohya_ss preset for SDXL, with values of our own."""

def preset(**changes) -> dict:
    return {key: value for key, value in (PRESET | changes).items() if value is not None}


LORA = 'network_module = "networks.lora"\nnetwork_dim = 4\n'


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.toml", "network_dim = = 3", ["no valid TOML"]),
    ("a.json", "{'network_dim': 3}", ["no valid JSON"]),
    ("a.json", "[1, 2]", ["holds a list"]),
    ("a.json", "[" * 100_000, ["no valid JSON"]),
    ("a.toml", "network_dim = 4\0", ["no text"]),
    ("a.json", preset(sdxl=False, v2=True), ["Stable Diffusion 2", "crumb trains LoRA and LoCon for SDXL"]),
    ("a.json", preset(sdxl=False), ["Stable Diffusion 1.5"]),
    ("a.json", preset(LoRA_type="Flux1", flux1_checkbox=True, sdxl=False), ["another family", "flux1"]),
    ("a.json", preset(sd3_checkbox=True), ["another family"]),
    ("a.toml", 'network_module = "networks.lora_flux"', ["another family"]),
    ("a.toml", LORA + "discrete_flow_shift = 3.0", ["another family"]),
    ("a.json", preset(LoRA_type=None, network_dim=None), ["trains a whole model"]),
    ("a.json", preset(LoRA_type="LyCORIS/iA3"), ["LyCORIS/iA3", "crumb trains LoRA"]),
    ("a.json", preset(LoRA_type="LyCORIS/Native Fine-Tuning"), ["Native Fine-Tuning"]),
    ("a.toml", 'network_module = "networks.oft"', ["networks.oft", "crumb plan"]),
    ("a.toml", LORA + "learning_rate = 0.0", ["every learning rate"]),
    ("a.toml", LORA + "network_train_text_encoder_only = true\nlearning_rate = 1e-4", ["text encoders alone"]),
    ("a.json", preset(unet_lr=0, learning_rate=0, text_encoder_lr=1e-5), ["text encoders alone"]),
    ("a.toml", "plan_version = 1", ["crumb plan already"]),
    ("a.toml", 'colour = "red"\nshape = "round"', ["no settings file"]),
    ("a.json", {"hello": {"world": 1}}, ["no settings file"]),
    ("a.toml", LORA + 'dataset_config = "gone.toml"', ["gone.toml", "--dataset-config"]),
    ("a.toml", LORA + "datasets = 3", ["datasets"]),
    ("a.toml", LORA + "[[datasets]]\nsubsets = 3", ["datasets"]),
    ("a.toml", LORA + "[[datasets]]\n[[datasets.subsets]]\nis_reg = true", ["no folder of pictures"]),
    ("a.json", preset(sdxl="perhaps"), ["neither true nor false"]),
])
def test_bad_files_are_refused_in_words(name, content, words, write):
    with pytest.raises(RequestError) as caught:
        translate(read_settings(write(content, name)))
    assert caught.value.exit_code == 2
    for word in [name, *words]:
        assert word in str(caught.value)


def test_binary_missing_and_huge_files_are_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(bytes(range(128, 256)))
    (tmp_path / "b.toml").write_bytes(b"#" * 5_000_000)
    for name, word in (("a.json", "no text"), ("b.toml", "too large"), ("c.toml", "no file"), ("", "can't be read")):
        with pytest.raises(RequestError, match=word):
            read_settings(tmp_path / name)


JUNK = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(
    ["1", "0.0", "true", "a,b", "--x", "1e400", "nan", "[]", "betas=0.9,0.99", "d=(((", "LyCORIS/LoCon", "cosine"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(sorted({*PRESET, *KNOWN_KEYS, "network_args", "dataset_config"})),
                               JUNK | st.lists(JUNK, max_size=3) | st.dictionaries(st.text(max_size=4), JUNK, max_size=2)))
def test_nonsense_is_refused_or_told_but_never_trips(changes, write):
    for gui in (True, False):
        content = PRESET | changes if gui else {"network_module": "networks.lora", "network_dim": 4} | changes
        try:
            translate(read_settings(write(json.dumps(content), "any.json")))
        except RequestError as error:
            assert str(error)


def test_dataset_files_win_over_the_settings(write, tmp_path):
    (tmp_path / "pictures").mkdir()
    write('[general]\nflip_aug = true\nresolution = 512\n[[datasets]]\nbatch_size = 3\nresolution = [768, 768]\n'
          '[[datasets.subsets]]\nimage_dir = "pictures"\nnum_repeats = 4\nclass_tokens = "a cat"\ncolor_aug = true\n'
          '[[datasets.subsets]]\nimage_dir = "rest"\nis_reg = true\n', "sets.toml")
    path = write(LORA + 'train_batch_size = 9\nresolution = "1024,1024"\n[section]\ndataset_config = "sets.toml"')
    translation = translate(read_settings(path))
    assert {key: translation.overrides[key] for key in ("batch_size", "resolution", "repeats")} == {
        "batch_size": 3, "resolution": 768, "repeats": 4}
    assert translation.answers["images"] == "pictures" and translation.answers["class_word"] == "a cat"
    told = {left.key: left.reason for left in translation.missing}
    assert "color_aug" in told and "image_dir of is_reg" in told
    elsewhere = write("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'pictures'\nnum_repeats = 2", "other.toml")
    assert translate(read_settings(path, elsewhere)).overrides["repeats"] == 2
    with pytest.raises(RequestError, match="no dataset file"):
        read_settings(path, path)


def test_several_folders(write, tmp_path, tiny_base):
    """Sub-folders that crumb would find by itself are one folder; others need room in the plan, or a folder by hand."""
    for name in ("2_cat", "6_dog"):
        (tmp_path / "all" / name).mkdir(parents=True)
    datasets = ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "all/2_cat"\nnum_repeats = {}\nkeep_tokens = 1\n'
                '[[datasets.subsets]]\nimage_dir = "all/6_dog"\nnum_repeats = 18\nkeep_tokens = 2\n')
    whole = translate(read_settings(write(LORA + datasets.format(6))))
    assert whole.overrides["repeats"] == 3 and whole.answers["images"] == str(tmp_path / "all")
    assert ("keep_tokens", [1, 2]) in [(left.key, left.value) for left in whole.missing]
    apart = translate(read_settings(write(LORA + datasets.format(5))))
    assert apart.overrides["repeats"] == 5 and apart.answers["images"] == "all/2_cat"
    further = next(row for row in TABLE if "subsets" in row.crumb).to_crumb(apart.file)["subsets"]
    assert further == [{"images": str(tmp_path / "all/6_dog"), "repeats": 18}]
    given = answers_of(apart, Answers(images=str(tmp_path / "all"), base=str(tiny_base)))
    assert given.images == str(tmp_path / "all") and "subsets" not in given.overrides
    if "subsets" not in plan_fields():
        with pytest.raises(RequestError, match=r"2 folders.*N_name.*--images DIR"):
            answers_of(apart, Answers(base=str(tiny_base)))


@pytest.mark.parametrize(("name", "content"), [
    ("p.txt", "a cat --n dog --s 9 --l 4.5\n\n# a remark\na hat"),
    ("p.json", '[{"prompt": "a cat", "negative_prompt": "dog", "sample_steps": 9, "scale": 4.5}, {"prompt": "a hat"}]'),
    ("p.toml", '[prompt]\nscale = 4.5\n[[prompt.subset]]\nprompt = "a cat"\nnegative_prompt = "dog"\nsample_steps = 9\n'
               '[[prompt.subset]]\nprompt = "a hat"'),
])
def test_prompts_are_read_from_their_file(name, content, write):
    write(content, name)
    file = read_settings(write(LORA + f'sample_prompts = "{name}"'))
    row = next(row for row in TABLE if row.kohya == ("sample_prompts",))
    assert row.to_crumb(file) == {"sample_prompts": ["a cat", "a hat"], "sample_steps": 9, "sample_guidance": 4.5,
                                  "sample_negative": "dog"}
    write("[" * 5000, name)
    if name != "p.txt":
        with pytest.raises(Untaken):
            row.to_crumb(file)
