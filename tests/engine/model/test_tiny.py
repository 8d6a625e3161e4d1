import subprocess
import sys

from safetensors import safe_open

from crumb.engine.model.tiny import SDXL, ldm_shapes, write_sdxl
from crumb.profiles.base_model import read_header


def test_the_full_size_layout_is_sdxl():
    shapes = dict(ldm_shapes(SDXL, vae=True))
    counts = {
        prefix: sum(name.startswith(prefix) for name in shapes)
        for prefix in (
            "model.diffusion_model.",
            "conditioner.embedders.0.",
            "conditioner.embedders.1.",
            "first_stage_model.",
        )
    }
    assert list(counts.values()) == [1680, 196, 390, 248] and len(shapes) == 2514
    assert shapes["conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"] == (1280,)
    assert shapes["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"] == (3840, 1280)
    assert shapes["first_stage_model.decoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert shapes["model.diffusion_model.label_emb.0.0.weight"] == (1280, 2816)
    assert shapes["model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"] == (640, 2048)


def test_the_command_writes_a_sound_file_that_the_seed_decides(tmp_path):
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    subprocess.run([sys.executable, "-P", "-m", "crumb.engine.model.tiny", paths[0]], check=True, capture_output=True)
    write_sdxl(paths[1], seed=0)
    write_sdxl(paths[2], seed=1)
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    assert read_header(paths[0])[1]["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    with safe_open(paths[0], framework="pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118
    assert sorted(tmp_path.iterdir()) == paths
