"""SDXL's blocks computed so that they keep little for backward: what they make is the same.

diffusers' modules stay in place with their weights, names and LoRA layers; only how the blocks compute changes.
"""

from collections import Counter
from functools import partial

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel, Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional as F

from crumb.engine.model.attention import Attend, Shape, attend
from crumb.engine.network.lora import LoRALayer
from crumb.kernels.feed_forward import feed_forward
from crumb.kernels.group_norm_silu import group_norm_silu
from crumb.kernels.linear import Layer
from crumb.kernels.norm_conv import ConvLayer, norm_conv
from crumb.kernels.norm_linears import Norm, norm_linears
from crumb.profiles.base_model import VAE_SCALE


def make_lean(unet: nn.Module, keep_int8: bool = False, attend: Attend = attend) -> None:
    """Changes how the U-Net's blocks compute, in place. `keep_int8`: what is kept of the feed-forward parts takes half."""
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.forward = partial(transformer_block, module, keep_int8, attend)
        elif isinstance(module, ResnetBlock2D):
            module.forward = partial(resnet_block, module)
        elif isinstance(module, Transformer2DModel):
            module.forward = partial(transformer_2d, module)
    unet.conv_norm_out.forward = partial(_norm_silu, unet.conv_norm_out)
    unet.conv_act = nn.Identity()


def attention_shapes(unet: nn.Module, batch_size: int, resolution: int, num_text_tokens: int = 77) -> dict[Shape, int]:
    """The attentions of a pass over pictures of the most tokens that a resolution has, and how many there are of each."""
    shapes, deepest = Counter(), len(unet.down_blocks) - 1
    for name, module in unet.named_modules():
        if isinstance(module, BasicTransformerBlock):
            part, number = name.split(".")[:2]
            level = int(number) if part == "down_blocks" else deepest - int(number) if part == "up_blocks" else deepest
            num_tokens = (resolution // VAE_SCALE // 2**level) ** 2
            heads = module.attn1.heads, module.attn1.inner_dim // module.attn1.heads
            shapes.update(Shape(batch_size, num_tokens, num_keys, *heads) for num_keys in (num_tokens, num_text_tokens))
    return dict(shapes)


def transformer_2d(model: Transformer2DModel, hidden_states: Tensor, encoder_hidden_states: Tensor, *_,
                   return_dict: bool = True, **__):
    """The picture (B, C, H, W) as a row of tokens (B, H W, C) through the blocks, added to itself."""
    norm, size = model.norm, hidden_states.shape[-2:]
    tokens = group_norm_silu(hidden_states, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=False)
    tokens = model.proj_in(tokens.flatten(2).transpose(1, 2))
    for block in model.transformer_blocks:
        tokens = block(tokens, None, encoder_hidden_states)
    sample = hidden_states + model.proj_out(tokens).transpose(1, 2).unflatten(2, size)
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def transformer_block(block: BasicTransformerBlock, keep_int8: bool, attend: Attend, hidden_states: Tensor,
                      _attention_mask: None, encoder_hidden_states: Tensor) -> Tensor:
    """Self-attention, attention to the text, feed-forward; each reads the normalised residual stream (B, tokens, d)."""
    attention = block.attn1
    layers = [_layer(module, hidden_states) for module in (attention.to_q, attention.to_k, attention.to_v)]
    query, key, value = norm_linears(hidden_states, _norm(block.norm1), layers)
    hidden_states = hidden_states + attention.to_out[0](attend(query, key, value, attention.heads))
    attention = block.attn2
    query, = norm_linears(hidden_states, _norm(block.norm2), [_layer(attention.to_q, hidden_states)])
    key, value = attention.to_k(encoder_hidden_states), attention.to_v(encoder_hidden_states)
    hidden_states = hidden_states + attention.to_out[0](attend(query, key, value, attention.heads))
    projection, _, out = block.ff.net
    return feed_forward(hidden_states, _norm(block.norm3), _layer(projection.proj, hidden_states),
                        _layer(out, hidden_states), keep_int8)


def resnet_block(block: ResnetBlock2D, input_tensor: Tensor, temb: Tensor, *_) -> Tensor:
    """Two convolutions of normalised and activated input, the time embedding between them, a shortcut past them."""
    hidden_states = norm_conv(input_tensor, _norm(block.norm1), _conv(block.conv1, input_tensor))
    hidden_states = hidden_states + block.time_emb_proj(F.silu(temb))[:, :, None, None]
    hidden_states = norm_conv(hidden_states, _norm(block.norm2), _conv(block.conv2, hidden_states))
    return hidden_states + (input_tensor if block.conv_shortcut is None else block.conv_shortcut(input_tensor))


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _norm(norm: nn.LayerNorm | nn.GroupNorm) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps, getattr(norm, "num_groups", 0))


def _layer(module: nn.Module, x: Tensor) -> Layer:
    """Of one pass: what dropout leaves out is drawn here."""
    return module.layer(x) if isinstance(module, LoRALayer) else Layer(module.weight, module.bias)


def _conv(module: nn.Module, x: Tensor) -> ConvLayer:
    return module.layer(x) if isinstance(module, LoRALayer) else ConvLayer(module.weight, module.bias, module.stride,
                                                                           module.padding)
