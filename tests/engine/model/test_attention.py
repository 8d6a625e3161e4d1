"""The choice of attention: what each way to go without xformers says, and that only what is equal and faster is taken."""

import json
import math
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel

from crumb.engine.model import attention
from crumb.engine.model.attention import SDXL_SHAPES, Shape, attend, choose_attention, compare, load_xformers
from crumb.engine.model.lean import attention_shapes, make_lean
from crumb.engine.model.load import load_unet
from crumb.engine.optional import hide_broken_packages
from crumb.profiles.base_model import inspect_base_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = {Shape(2, 24, 24, 3, 8): 2, Shape(2, 24, 7, 3, 8): 1}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts an xformers of our own making on the path."""
    def put(ops: str, top: str = ""):
        (tmp_path / "xformers").mkdir()
        (tmp_path / "xformers" / "__init__.py").write_text(top)
        (tmp_path / "xformers" / "ops.py").write_text(ops)
        monkeypatch.syspath_prepend(tmp_path)
    forget = [name for name in sys.modules if name.split(".")[0] == "xformers"]
    for name in forget:
        monkeypatch.delitem(sys.modules, name)
    yield put
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        del sys.modules[name]


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """Arguments are made on the processor; what was asked of torch's settings comes back."""
    asked = []
    monkeypatch.setattr(torch.backends.cuda, "enable_math_sdp", asked.append)
    make = attention._random_arguments
    monkeypatch.setattr(attention, "_random_arguments", lambda shape, device, dtype: make(shape, CPU, dtype))
    return asked


def plain(query, key, value):
    """By definition; (B, tokens, heads, width)."""
    scores = torch.einsum("bqhc,bkhc->bhqk", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), value)


def test_torchs_own_is_attention_by_definition():
    query, key, value = (torch.randn(2, count, 24, dtype=torch.float64) for count in (10, 6, 6))
    split = [tensor.unflatten(-1, (3, 8)) for tensor in (query, key, value)]
    torch.testing.assert_close(attend(query, key, value, 3), plain(*split).flatten(2))


def test_without_a_gpu_torchs_own(as_if_on_a_gpu):
    choice = choose_attention(CPU, torch.float32, SDXL_SHAPES)
    assert (choice.name, choice.attend) == ("torch", attend) and "cpu" in choice.reason
    assert not as_if_on_a_gpu


@pytest.mark.parametrize(("ops", "words"), [
    ("raise OSError('libcudart.so.12: undefined symbol')", "OSError: libcudart"),
    ("raise RuntimeError('operator xformers::x does not exist')", "RuntimeError: operator"),
    ("import no_such_module", "no_such_module"), ("", "cannot import name")])
def test_a_broken_one_is_left_alone(installed, as_if_on_a_gpu, ops, words):
    installed(ops)
    choice = choose_attention(CUDA, torch.float32, SHAPES)
    assert (choice.name, choice.attend) == ("torch", attend)
    assert "installed but broken" in choice.reason and words in choice.reason
    assert as_if_on_a_gpu == [False], "math attention must be off on a GPU"


def test_one_that_is_not_installed(installed, as_if_on_a_gpu, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    assert "not installed" in choose_attention(CUDA, torch.float32, SHAPES).reason


def test_one_whose_operators_are_broken_is_hidden_from_diffusers(installed, monkeypatch):
    """diffusers imports xformers.ops, which can fail although xformers itself imports."""
    installed("raise OSError('undefined symbol')")
    monkeypatch.setattr("crumb.engine.optional.OPTIONAL", {"xformers": "attention is torch's own"})
    told = []
    hide_broken_packages(told.append)
    assert len(told) == 1 and "undefined symbol" in told[0] and sys.modules["xformers"] is None
    assert load_xformers()[0] is None and "broken" in load_xformers()[1]


EQUAL = "def memory_efficient_attention(q, k, v):\n    import torch\n" \
        "    return torch.einsum('bhqk,bkhc->bqhc', (torch.einsum('bqhc,bkhc->bhqk', q, k) / q.shape[-1]**0.5).softmax(-1), v)"


def timed(monkeypatch, xformers_ms: float, torch_ms: float):
    monkeypatch.setattr(attention, "_milliseconds", lambda compute, *_: torch_ms if compute is attend else xformers_ms)


def test_the_faster_one_is_taken_where_it_computes_the_same(installed, as_if_on_a_gpu, monkeypatch):
    installed(EQUAL)
    for xformers_ms, name in ((1.0, "xformers"), (1.98, "torch"), (3.0, "torch")):
        timed(monkeypatch, xformers_ms, 2.0)
        choice = choose_attention(CUDA, torch.float32, SHAPES)
        assert choice.name == name, choice
        assert f"{3 * xformers_ms:.1f} ms" in choice.reason and "6.0" in choice.reason, "each shape as often as it occurs"
    timed(monkeypatch, 1.0, 2.0)
    query = torch.randn(2, 5, 24)
    found = choose_attention(CUDA, torch.float32, SHAPES).attend(query, query, query, 3)
    torch.testing.assert_close(found, attend(query, query, query, 3))


@pytest.mark.parametrize("change", [lambda y: y * 1.01, lambda y: y.detach() + (y - y.detach()) * 1.01, lambda y: y * math.nan])
def test_one_that_computes_something_else_is_not_taken(monkeypatch, change):
    """In the result, in the gradients alone, or not at all."""
    timed(monkeypatch, 1.0, 2.0)
    choice = compare(lambda *given: change(attend(*given)), CPU, torch.float32, SHAPES)
    assert choice.name == "torch" and "something else" in choice.reason


@pytest.mark.parametrize(("error", "words"), [
    (NotImplementedError("No operator found\n`fa2B` is not supported because:\n    operator is non-deterministic, but"),
     "no repeatable backward"),
    (NotImplementedError("No operator found\n    operator wasn't built - see"), "another torch"),
    (torch.OutOfMemoryError("CUDA out of memory\nand more"), "OutOfMemoryError: CUDA out of memory")])
def test_one_that_refuses_is_not_taken(monkeypatch, error, words):
    def refuse(*_):
        raise error
    timed(monkeypatch, 1.0, 2.0)
    choice = compare(refuse, CPU, torch.float32, SHAPES)
    assert choice.name == "torch" and words in choice.reason and "and more" not in choice.reason


def test_the_choice_draws_nothing_that_training_draws(monkeypatch):
    timed(monkeypatch, 1.0, 2.0)
    before = torch.get_rng_state()
    assert compare(lambda *given: attend(*given), CPU, torch.float32, SHAPES).name == "xformers"
    assert torch.equal(torch.get_rng_state(), before)


def test_the_shapes_are_those_that_the_unet_calls_for(tiny_base):
    unet, called = load_unet(inspect_base_model(tiny_base), torch.float32), {}

    def spy(query, key, value, num_heads):
        shape = Shape(len(query), query.shape[1], key.shape[1], num_heads, query.shape[2] // num_heads)
        called[shape] = called.get(shape, 0) + 1
        return attend(query, key, value, num_heads)

    make_lean(unet, attend=spy)
    config = unet.config
    with torch.no_grad():
        unet(torch.randn(3, 4, 16, 16), torch.tensor(5), encoder_hidden_states=torch.randn(3, 77, config.cross_attention_dim),
             added_cond_kwargs={"text_embeds": torch.randn(3, config.projection_class_embeddings_input_dim - 6 * 256),
                                "time_ids": torch.ones(3, 6)})
    assert attention_shapes(unet, 3, 128) == called


def test_the_shapes_of_sdxl():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True)
    assert attention_shapes(unet, 1, 1024) == SDXL_SHAPES


def test_what_the_doctor_asks():
    done = subprocess.run([sys.executable, "-P", "-m", "crumb.engine.model.attention"], capture_output=True, text=True,
                          check=True)
    assert json.loads(done.stdout)["name"] in ("torch", "xformers")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_at_sizes_of_sdxl(dtype, request):
    """Whatever is chosen takes its shapes without the scores ever being held, and repeats itself bit by bit."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # as in a run
    request.addfinalizer(lambda: (torch.use_deterministic_algorithms(False), torch.backends.cuda.enable_math_sdp(True)))
    choice = choose_attention(CUDA, dtype, SDXL_SHAPES)
    for shape in SDXL_SHAPES:
        given = attention._random_arguments(shape, CUDA, dtype)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        first, again = (attention._pass(choice.attend, given, shape.num_heads) for _ in range(2))
        scores = shape.num_heads * shape.num_tokens * shape.num_keys * 2
        if shape.num_keys == shape.num_tokens:
            assert torch.cuda.max_memory_allocated() - before < scores
        exact = attention._pass(attend, [tensor.detach().double().cpu().requires_grad_(index < 3)
                                         for index, tensor in enumerate(given)], shape.num_heads)
        for found, repeated, right in zip(first, again, exact):
            assert torch.equal(found, repeated)
            assert ((found.double().cpu() - right).norm() / right.norm()).item() < 4 * torch.finfo(dtype).eps
