"""LoRA layers in the text encoders: every linear of every layer, under kohya's names."""

import re

from torch import nn

from crumb.engine.model.keys import text_name
from crumb.engine.model.load import TextEncoders
from crumb.engine.network.lora import Network, put_layer
from crumb.profiles.plan import Plan

LINEAR = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))")


def attach_text_lora(network: Network, encoders: TextEncoders, plan: Plan) -> None:
    """Replaces linears of the encoders whose rate is above 0 in place, and enters them in `network`.

    Encoder 1's layers behind the one that is read never get a gradient and stay as they are; encoder 2's pooled state
    comes from its last one.
    """
    rates = {"lora_te1": plan.text_encoder_learning_rate, "lora_te2": plan.text_encoder_2_learning_rate}
    for (prefix, rate), encoder in zip(rates.items(), (encoders.text_encoder, encoders.text_encoder_2)):
        num_read = encoder.config.num_hidden_layers - (plan.clip_skip - 1 if prefix == "lora_te1" else 0)
        for name, module in list(encoder.named_modules()):
            match = LINEAR.fullmatch(text_name(name))
            if rate and match and int(match[1]) < num_read and isinstance(module, nn.Linear):
                stem = f"{prefix}_{text_name(name).replace('.', '_')}"
                put_layer(network, encoder, name, stem, plan.rank, plan.alpha, rate / plan.learning_rate, plan)
