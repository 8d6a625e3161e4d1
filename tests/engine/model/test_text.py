import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from crumb.engine.model.load import load_text_encoders
from crumb.engine.model.text import encode_prompts, pad_chunks
from crumb.engine.model.tiny import write_sdxl
from crumb.engine.model.tokenizer import make_tokenizers
from crumb.profiles.base_model import inspect_base_model
from crumb.profiles.errors import RequestError


def test_known_token_ids_and_both_paddings():
    for tokenizer, pad in zip(make_tokenizers(), (49407, 0), strict=True):
        assert len(tokenizer) == 49408
        ids = tokenizer("a photo of a cat", padding="max_length", max_length=77, truncation=True).input_ids
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [pad] * 70
        # "!" is a word of its own, not the padding that shares its letter
        assert tokenizer("Hello,  World!").input_ids == [49406, 3306, 267, 1002, 256, 49407]
        assert len(tokenizer("cat " * 200, truncation=True).input_ids) == 77


def test_conditioning_equals_the_reference_pipeline(tmp_path):
    write_sdxl(tmp_path / "tiny.safetensors", vae=False)
    encoders = load_text_encoders(inspect_base_model(tmp_path / "tiny.safetensors"), torch.float32)
    pipeline = StableDiffusionXLPipeline(
        vae=None, unet=None, scheduler=None, text_encoder=encoders.text_encoder, text_encoder_2=encoders.text_encoder_2,
        tokenizer=encoders.tokenizer, tokenizer_2=encoders.tokenizer_2, add_watermarker=False,
    )  # fmt: skip
    prompts = ["a photo of a cat", "", "masterpiece, 1girl, (smile:1.2)!", "a very long caption " * 40]
    states, pooled = encode_prompts(encoders, prompts)
    assert states.shape == (4, 77, 128) and pooled.shape == (4, 64)
    for index, prompt in enumerate(prompts):
        expected_states, _, expected_pooled, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, device="cpu"
        )
        torch.testing.assert_close(states[index], expected_states[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(pooled[index], expected_pooled[0], atol=1e-5, rtol=0)
    assert (states[0] - states[1]).abs().max() > 0.1


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tiny.safetensors"
    write_sdxl(path, vae=False)
    return load_text_encoders(inspect_base_model(path), torch.float32)


@pytest.mark.parametrize("clip_skip", [2, 3])
def test_clip_skip_is_the_reference_pipelines_plus_two(encoders, clip_skip):
    """diffusers counts from SDXL's own second-last layer, people count from the end."""
    pipeline = StableDiffusionXLPipeline(
        vae=None, unet=None, scheduler=None, text_encoder=encoders.text_encoder, text_encoder_2=encoders.text_encoder_2,
        tokenizer=encoders.tokenizer, tokenizer_2=encoders.tokenizer_2, add_watermarker=False,
    )  # fmt: skip
    expected, _, pooled, _ = pipeline.encode_prompt("a cat", do_classifier_free_guidance=False, device="cpu",
                                                    clip_skip=clip_skip - 2 or None)
    got = encode_prompts(encoders, ["a cat"], clip_skip)
    torch.testing.assert_close(got[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(got[1], pooled, atol=1e-5, rtol=0)
    with pytest.raises(RequestError, match="layers"):
        encode_prompts(encoders, ["a cat"], 12)


def test_long_prompts_are_chunks_laid_one_after_the_other(encoders):
    cats, dogs = "cat " * 75, "dog " * 30
    both, first, second = (encode_prompts(encoders, [text], 2, 150) for text in (cats + dogs, cats, dogs))
    assert both[0].shape[1] == 154
    torch.testing.assert_close(both[0], torch.cat([first[0], second[0]], dim=1), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[1], first[1], atol=1e-5, rtol=0)
    assert encode_prompts(encoders, [cats + dogs])[0].shape[1] == 77, "cut off where no more is asked for"
    assert encode_prompts(encoders, [cats * 4], 2, 225)[0].shape[1] == 231
    # Beside a long one, a short prompt gets empty chunks; from the cache the same comes by pad_chunks.
    together = encode_prompts(encoders, [cats + dogs, "a cat"], 2, 150)[0]
    short, empty = encode_prompts(encoders, ["a cat"])[0][0], encode_prompts(encoders, [""])[0][0]
    padded = pad_chunks([both[0][0], short], empty)
    torch.testing.assert_close(padded, together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_reach_a_trained_encoder_only(trained, tmp_path):
    write_sdxl(tmp_path / "tiny.safetensors", vae=False)
    encoders = load_text_encoders(inspect_base_model(tmp_path / "tiny.safetensors"), torch.float32)
    encoders.text_encoder.requires_grad_(trained)
    states, pooled = encode_prompts(encoders, ["cat"])
    assert (states.requires_grad, pooled.requires_grad) == (trained, False)
