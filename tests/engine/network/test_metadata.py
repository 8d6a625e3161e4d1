"""What a LoRA file says of its network, in sd-scripts' words: network_args as its command line has them, all texts."""

import json
from pathlib import Path

import pytest

from crumb.engine.network.metadata import lora_metadata
from crumb.profiles.buckets import Crop
from crumb.profiles.pictures import Picture


@pytest.fixture
def metadata_of(make_plan):
    def metadata_of(**settings) -> dict[str, str]:
        pictures = [Picture(Path("/p/a.jpg"), 64, 64, 1, "a cat", None)]
        metadata = lora_metadata(make_plan(images="/p", **settings), "0" * 64, pictures, [Crop(64, 64, 64, 64, 0, 0)],
                                 ["a cat"], 5)
        assert all(isinstance(value, str) for value in metadata.values())
        return metadata
    return metadata_of


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, {}), ({"targets": "attention"}, {}),
    ({"conv_rank": 4, "conv_alpha": 2.0, "targets": "attention+ff+conv"}, {"conv_dim": "4", "conv_alpha": "2.0"}),
    ({"rank_dropout": 0.1, "module_dropout": 0.2, "lora_plus_ratio": 8.0},
     {"rank_dropout": "0.1", "module_dropout": "0.2", "loraplus_lr_ratio": "8.0"}),
    ({"rank": 8, "block_ranks": {"IN04": 16, "MID": 4}}, {"block_dims": "8,8,8,8,8,16,8,8,8,8,4,4,4,8,8,8,8,8,8,8,8,8,8"}),
    ({"rank": 8, "alpha": 1.0, "block_alphas": {"OUT08": 3.0}},
     {"block_dims": "8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8",
      "block_alphas": "1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,3.0,1.0"}),
    ({"rank": 8, "conv_rank": 2, "targets": "attention+ff+conv", "conv_block_ranks": {"IN01": 6},
      "conv_block_alphas": {"OUT00": 4.0}},
     {"conv_dim": "2", "conv_alpha": "1.0", "block_dims": "8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8",
      "conv_block_dims": "2,2,6,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2",
      "conv_block_alphas": "1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,4.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0"}),
    ({"block_rates": {"IN04": 0.5, "MID": 0}},
     {"down_lr_weight": "1.0,1.0,1.0,1.0,0.5,1.0,1.0,1.0,1.0", "mid_lr_weight": "0,0,0",
      "up_lr_weight": "1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0"})])
def test_network_args_are_what_sd_scripts_would_have_been_given(metadata_of, settings, expected):
    assert json.loads(metadata_of(**settings)["ss_network_args"]) == expected


@pytest.mark.parametrize(("first", "second", "stop", "expected"), [
    (0.0, 0.0, 1.0, "0.0"), (1e-5, 1e-5, 1.0, "1e-05"), (1e-5, 2e-5, 0.5, "[1e-05, 2e-05]"), (0.0, 2e-5, 1.0, "[0.0, 2e-05]"),
    (1e-5, 2e-5, 0.0, "0.0")])
def test_rates_of_text_encoders_are_one_number_or_both(metadata_of, first, second, stop, expected):
    metadata = metadata_of(learning_rate=1e-4, text_encoder_learning_rate=first, text_encoder_2_learning_rate=second,
                           text_encoder_stop_after=stop)
    assert (metadata["ss_text_encoder_lr"], metadata["ss_unet_lr"]) == (expected, "0.0001")
