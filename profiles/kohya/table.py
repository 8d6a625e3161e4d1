"""The table of correspondences between sd-scripts (kohya) and a crumb plan, for both directions and for docs/parity.md.

A row may name a plan setting that this crumb does not have yet; who uses the table asks `plan_fields`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from crumb.profiles.kohya import network, optimizer, training
from crumb.profiles.kohya import writing as to
from crumb.profiles.kohya.values import KohyaFile, number, resolution_side, truth, whole
from crumb.profiles.plan import Plan


@dataclass(frozen=True)
class Row:
    """One correspondence. Without `crumb` names kohya's alone, without `kohya` crumb's alone."""

    kohya: tuple[str, ...] = ()
    crumb: tuple[str, ...] = ()
    to_crumb: Callable[[KohyaFile], dict[str, Any]] | None = None
    """Plan settings from a file; raises Untaken."""
    to_kohya: Callable[[Plan], dict[str, Any]] | None = None
    """Keys and values from a plan; raises Untaken. A blank text is not written."""
    neutral: tuple = ()
    """Values that change nothing: kohya's, or the plan's where the row is crumb's alone."""
    reason: str = ""
    """Why there is no counterpart, or what happens instead."""
    place: str = "training"
    """Where export writes it: a section of the settings file, or network_args, dataset, subset."""
    reads: tuple[str, ...] = ()
    """Further keys of kohya's that the row follows from, though other rows take them over."""
    ignored: bool = False
    """About the machine, the GUI, paths or logging: of no effect on what is learned."""


@dataclass(frozen=True)
class Left:
    """One setting that the other side does not get, and why."""

    key: str
    value: Any
    reason: str


def _same(key: str, read: Callable, crumb: str = "", place: str = "training", neutral: tuple = (), reason: str = "") -> Row:
    """One key that means what one setting means."""
    name = crumb or key
    return Row((key,), (name,), lambda file: {name: read(file[key])}, lambda plan: {key: getattr(plan, name)}, neutral, reason,
               place)


def _none(keys: str, neutral: tuple, reason: str) -> Row:
    return Row(tuple(keys.split()), neutral=neutral, reason=reason)


def _ignored(keys: str, reason: str) -> Row:
    return Row(tuple(keys.split()), reason=reason, ignored=True)


def _own(names: str, neutral: tuple, reason: str, ignored: bool = False) -> Row:
    return Row(crumb=tuple(names.split()), neutral=neutral, reason=reason, ignored=ignored)


OFF = (0, False)

MODEL = (
    _same("pretrained_model_name_or_path", str, "base_model", "model"),
    _same("vae", str, place="model", neutral=("",)),
    Row(("v_parameterization",), ("prediction_type",), training.prediction, to.prediction, OFF, place="model"),
    _same("zero_terminal_snr", truth, place="model", neutral=OFF),
    _none("v2", OFF, "crumb trains SDXL"),
    _ignored("clip_skip", "sd-scripts ignores it for SDXL, as crumb does: the encoders' second-last layer is SDXL's own"),
    _own("clip_skip", (2,), "sd-scripts always takes SDXL's own layer, the second-last"),
)

DATA = (
    _same("train_data_dir", str, "images", "subset"),
    Row(("class_tokens",), ("class_word",), lambda file: {"class_word": str(file["class_tokens"])}, to.class_tokens,
        place="subset"),
    _own("trigger", ("",), "sd-scripts puts no word before captions that lack it: write it into the captions"),
    _same("resolution", resolution_side, place="dataset"),
    _same("enable_bucket", truth, "buckets", "dataset"),
    Row(("bucket_no_upscale",), ("upscale",), lambda file: {"upscale": not truth(file["bucket_no_upscale"])},
        lambda plan: {"bucket_no_upscale": not plan.upscale}, place="dataset"),
    _none("min_bucket_reso", (256, 320, 384, 448, 512), "crumb's buckets have sides from half to twice the resolution"),
    _none("max_bucket_reso", (1024, 1536, 2048), "crumb's buckets have sides from half to twice the resolution"),
    _none("bucket_reso_steps", (64,), "crumb's buckets go in steps of 64 pixels"),
    Row(("num_repeats", "dataset_repeats"), ("repeats",), training.repeats, lambda plan: {"num_repeats": plan.repeats},
        place="subset", reads=("max_train_steps", "max_train_epochs", "epoch")),
    _same("train_batch_size", whole, "batch_size", "dataset"),
    Row(("datasets.subsets",), ("subsets",), training.further_subsets, place="data",
        reason="crumb takes one folder: put the others into it as sub-folders named N_name, N being their repeats"),
    Row(("reg_data_dir",), ("regularization",), training.regularization, place="data", neutral=("",),
        reason="crumb has no regularization pictures"),
    _same("prior_loss_weight", number, neutral=(1,), reason="crumb has no regularization pictures"),
    Row(("alpha_mask", "masked_loss", "conditioning_data_dir"), ("masked_loss",), training.mask, to.mask, (*OFF, ""),
        "crumb has no masks", "subset"),
    _own("mask_floor", OFF, "a mask's black counts nothing in sd-scripts"),
    _same("flip_aug", truth, "flip", "subset", OFF, "crumb does not mirror pictures"),
    _none("color_aug random_crop face_crop_aug_range", OFF, "crumb trains each picture whole and in its own colours"),
    _ignored("validation_seed", "crumb measures on noise of its own, the same every time"),
    Row(("validation_split",), ("held_out_pictures",), training.held_out, to.held_out, OFF, place="training"),
    Row(("validate_every_n_steps",), ("judge_every",), lambda file: {"judge_every": whole(file["validate_every_n_steps"])},
        lambda plan: to.above_zero(plan, "judge_every", "validate_every_n_steps")),
    _own("skip_broken", OFF, "sd-scripts stops at a picture that it can't read"),
)

CAPTIONS = (
    _none("caption_extension caption_extention", (".txt", ".caption"),
          "crumb reads captions from .txt and .caption files beside the pictures: rename them"),
    _same("shuffle_caption", truth, "shuffle_captions", "subset", OFF, "crumb keeps captions as they stand"),
    _same("keep_tokens", whole, place="subset", neutral=OFF, reason="crumb keeps captions as they stand"),
    _same("caption_dropout_rate", number, "caption_dropout", "subset", OFF, "crumb never leaves a caption out"),
    _same("caption_tag_dropout_rate", number, "tag_dropout", "subset", OFF, "crumb never leaves tags out"),
    _same("caption_prefix", str, place="subset", neutral=("",), reason="crumb puts the trigger word first, and nothing else"),
    _same("caption_suffix", str, place="subset", neutral=("",), reason="crumb adds nothing to captions"),
    _same("max_token_length", whole, place="training", neutral=(75,), reason="crumb reads the first 75 tokens of a caption"),
    _none("caption_dropout_every_n_epochs", OFF, "crumb leaves captions out by chance alone"),
    _none("token_warmup_min", (1,), "crumb shows the whole caption from the start"),
    _none("token_warmup_step", OFF, "crumb shows the whole caption from the start"),
    _none("caption_separator", (",",), "tags are separated by commas in crumb"),
    _none("keep_tokens_separator secondary_separator", ("",), "tags are separated by commas in crumb"),
    _none("enable_wildcard weighted_captions no_token_padding", OFF, "crumb takes a caption's words as they stand"),
    _none("in_json metadata_file", ("",), "crumb reads captions from files beside the pictures"),
)

NETWORK = (
    Row(("network_module", "algo"), ("method",), network.method, to.network_module, place="network"),
    _same("network_dim", whole, "rank", "network"),
    Row(("network_alpha",), ("alpha",), network.alpha, lambda plan: {"network_alpha": plan.alpha}, place="network"),
    Row(("conv_dim", "preset"), ("conv_rank", "targets"), network.convolutions, to.convolutions, OFF, place="network_args",
        reads=("network_module", "conv_block_dims")),
    Row(("conv_alpha",), ("conv_alpha",), network.conv_alpha,
        lambda plan: {"conv_alpha": plan.conv_alpha} if plan.conv_rank else {}, place="network_args",
        reads=("conv_block_dims",)),
    Row(("block_dims",), ("block_ranks",), network.block_ranks, to.block_ranks, ("",), "crumb has one rank for all blocks",
        "network_args"),
    Row(("block_alphas",), ("block_alphas",), network.block_alphas, to.block_alphas, ("",),
        "crumb has one alpha for all blocks", "network_args"),
    Row(("conv_block_dims",), ("conv_block_ranks",), network.conv_block_ranks, to.conv_block_ranks, ("",),
        "crumb's convolutions have one rank for all blocks", "network_args"),
    Row(("conv_block_alphas",), ("conv_block_alphas",), network.conv_block_alphas, to.conv_block_alphas, ("",),
        "crumb's convolutions have one alpha for all blocks", "network_args"),
    Row(("down_lr_weight", "mid_lr_weight", "up_lr_weight"), ("block_rates",), network.block_rates, to.block_rates, ("",),
        "crumb has one rate for all blocks", "network_args"),
    _none("block_lr_zero_threshold", OFF, "a block of rate 0 does not learn; crumb knows no other threshold"),
    _same("network_dropout", number, place="network", neutral=OFF, reason="crumb drops nothing out of the network"),
    _same("rank_dropout", number, place="network_args", neutral=OFF, reason="crumb drops nothing out of the network"),
    _same("module_dropout", number, place="network_args", neutral=OFF, reason="crumb drops nothing out of the network"),
    _same("scale_weight_norms", number, "max_norm", "network", OFF, "crumb sets the LoRA's norm no limit"),
    Row(("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"), ("lora_plus_ratio",),
        network.lora_plus, to.lora_plus, OFF, "crumb's A and B matrices learn at one rate", "network_args"),
    Row(("network_weights",), ("start_from",), training.start_from, lambda plan: {"network_weights": plan.start_from}, ("",),
        "crumb starts every LoRA anew", "network"),
    _none("dim_from_weights", OFF, "the rank must be that of the LoRA that is started from: crumb takes it from the plan"),
    _none("base_weights base_weights_multiplier", ("",), "merge that LoRA into the base model first"),
    _none("dora_wd", OFF, "crumb trains no DoRA"),
    _none("train_norm", OFF, "crumb leaves the norm layers as they are"),
    _none("factor", (-1,), "only LoKr has it"),
    _none("unit block_size", (1,), "only DyLoRA has it"),
    _none("use_cp use_conv_cp use_tucker", OFF, "crumb's convolutions are plain low-rank pairs"),
    _none("use_scalar rank_dropout_scale constrain constraint rescaled decompose_both bypass_mode full_matrix dropout", OFF,
          "a LyCORIS option that LoRA does not have"),
    _ignored("train_on_input", "only iA3 has it"),
)

TRAINING = (
    Row(("max_train_epochs", "max_train_steps", "epoch"), ("steps", "epochs"), training.length,
        lambda plan: {"max_train_steps": plan.steps}, reason="it sets no length"),
    _same("gradient_accumulation_steps", whole, neutral=(1,)),
    _same("mixed_precision", str),
    _same("gradient_checkpointing", truth),
    _same("seed", whole),
    _own("device", ("cuda", "auto"), "accelerate chooses where to train"),
    _own("vram_gib created", (), "about this machine and this moment", ignored=True),
    _none("full_fp16 full_bf16", OFF, "crumb keeps the LoRA's weights and their optimizer in fp32"),
    Row(("fp8_base", "fp8_base_unet"), ("quantize_base",), training.quantize_base, to.quantize_base, OFF,
        "crumb keeps the base in the run's own format"),
    _own("int8_activations", OFF, "sd-scripts keeps activations as they are"),
    _none("multi_gpu", OFF, "`crumb train --gpus N` starts several"),
    _none("num_processes num_machines", (0, 1), "`crumb train --gpus N` and docs/parallel.md"),
)

OPTIMIZER = (
    Row(("optimizer_type", "use_8bit_adam", "use_lion_optimizer"), ("optimizer",), optimizer.optimizer,
        to.optimizer, place="optimizer", reads=("learning_rate", "unet_lr")),
    Row(("optimizer_args",), ("optimizer_args",), optimizer.optimizer_args, to.optimizer_args, place="optimizer",
        reads=("optimizer_type",)),
    Row(("learning_rate", "unet_lr"), ("learning_rate",), optimizer.learning_rate, to.learning_rate, place="optimizer"),
    Row(("text_encoder_lr", "network_train_unet_only", "network_train_text_encoder_only"),
        ("text_encoder_learning_rate", "text_encoder_2_learning_rate"), optimizer.text_encoder_rates, to.text_encoder_rates,
        place="optimizer", reads=("learning_rate", "unet_lr"), reason="crumb trains the U-Net alone"),
    Row(("stop_text_encoder_training_pct", "stop_text_encoder_training"), ("text_encoder_stop_after",),
        optimizer.text_encoder_stop, to.text_encoder_stop, OFF, "crumb trains the U-Net alone"),
    Row(("lr_scheduler",), ("scheduler",), optimizer.scheduler, lambda plan: {"lr_scheduler": plan.scheduler},
        place="optimizer"),
    Row(("lr_warmup", "lr_warmup_steps"), ("warmup_ratio",), optimizer.warmup, to.warmup, OFF, place="optimizer"),
    _same("lr_scheduler_num_cycles", whole, "scheduler_cycles", "optimizer", (0, 1), "crumb's schedules fall once"),
    _same("lr_scheduler_power", number, "scheduler_power", "optimizer", (0, 1), "crumb's schedules have no power"),
    _none("lr_scheduler_type", ("",), "a class of torch's or one's own; crumb follows lr_scheduler"),
    _none("lr_scheduler_args", ("",), "they belong to a scheduler class that crumb does not have"),
    _none("lr_scheduler_timescale lr_scheduler_min_lr_ratio lr_decay_steps", OFF, "crumb's schedules don't have it"),
    _same("max_grad_norm", number, place="optimizer"),
    _ignored("fused_backward_pass", "it saves memory, and gains a LoRA nearly nothing"),
)

NOISE = (
    _same("noise_offset", number, place="noise", neutral=OFF),
    _none("noise_offset_random_strength", OFF, "crumb's noise offset has one strength"),
    _none("adaptive_noise_scale", OFF, "crumb's noise offset has one strength"),
    _same("multires_noise_iterations", whole, place="noise", neutral=OFF),
    _same("multires_noise_discount", number, place="noise", neutral=(0, 0.3)),
    _same("ip_noise_gamma", number, "input_perturbation", "noise", OFF),
    _none("ip_noise_gamma_random_strength", OFF, "crumb's input perturbation has one strength"),
    _same("min_timestep", whole, "timestep_min", "noise", OFF),
    _same("max_timestep", whole, "timestep_max", "noise", (1000,)),
    _own("timestep_sampling", ("uniform",), "sd-scripts trains all noise levels of SDXL alike"),
    _own("logit_mean logit_std", (), "timestep_sampling says whether they count", ignored=True),
)

LOSS = (
    Row(("loss_type",), ("loss_type",), training.loss_type, lambda plan: {"loss_type": plan.loss_type}, ("l2",), place="loss"),
    _same("huber_c", number, place="loss", neutral=(0.1,)),
    _same("huber_schedule", str, place="loss", neutral=("snr",)),
    _none("huber_scale", (1,), "crumb's Huber loss is not scaled"),
    Row(("min_snr_gamma", "debiased_estimation_loss"), ("loss_weighting", "min_snr_gamma"), training.weighting, to.weighting,
        OFF, place="loss"),
    _none("scale_v_pred_loss_like_noise_pred v_pred_like_loss", OFF, "crumb weighs the loss of noise levels in other ways"),
)

OUTPUT = (
    _same("output_name", str, "name", "output"),
    _same("save_precision", str, place="output"),
    Row(("save_every_n_steps", "save_every_n_epochs"), ("save_every",), training.save_every,
        lambda plan: to.above_zero(plan, "save_every", "save_every_n_steps"), OFF, place="output"),
    Row(("save_last_n_epochs", "save_last_n_steps"), ("keep_checkpoints",), training.keep_checkpoints, to.keep_checkpoints, OFF,
        place="output"),
    Row(("sample_every_n_steps", "sample_every_n_epochs"), ("sample_every",), training.sample_every,
        lambda plan: {"sample_every_n_steps": plan.sample_every}, OFF, place="output"),
    Row(("sample_prompts",), ("sample_prompts", "sample_steps", "sample_guidance", "sample_negative"), training.sample_prompts,
        place="data"),
    Row(("log_with",), ("trackers",), training.trackers, to.trackers, ("",), "crumb's own dashboard shows the run", "output"),
    _none("save_model_as", ("safetensors",), "crumb writes .safetensors"),
    _none("save_n_epoch_ratio", OFF, "crumb saves every so many steps"),
    _none("resume", ("",), "the state that sd-scripts saved can't be read; `network_weights` starts from a LoRA"),
    _none("training_comment metadata_title metadata_author metadata_description metadata_license metadata_tags", ("",),
          "crumb writes metadata of its own; a trigger word is given with --trigger"),
)

MACHINE = (
    _ignored("cache_latents cache_latents_to_disk vae_batch_size cache_info skip_cache_check", "crumb encodes once, to disk"),
    _own("cache_latents vae_tiling", (), "sd-scripts caches latents as well, and tiles by itself", ignored=True),
    _ignored("cache_text_encoder_outputs cache_text_encoder_outputs_to_disk text_encoder_batch_size",
             "crumb keeps what the text encoders make of captions wherever it can"),
    _own("caption_variants", (), "sd-scripts shuffles anew each time, and then can't cache what the text encoders make",
         ignored=True),
    _ignored("no_half_vae", "crumb chooses the VAE's precision"),
    _ignored("xformers sdpa mem_eff_attn split_attn", "crumb chooses the fastest attention"),
    _ignored("lowram highvram lowvram torch_compile compile disable_mmap_load_safetensors blocks_to_swap "
             "cpu_offload_checkpointing", "crumb fits the run into the card's memory"),
    _ignored("dynamo_backend dynamo_mode dynamo_use_fullgraph dynamo_use_dynamic extra_accelerate_launch_args gpu_ids "
             "main_process_port num_cpu_threads_per_process max_data_loader_n_workers persistent_data_loader_workers "
             "ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph tokenizer_cache_dir", "about the machine"),
    _ignored("output_dir save_as_bool file_path headless print_only model_list sdxl config_file output_config dataset_config "
             "sample_sampler sample_at_first noise_offset_type save_state save_state_on_train_end save_last_n_steps_state "
             "save_last_n_epochs_state", "about the program or where it writes: runs are made in ./runs, with every state"),
    _ignored("logging_dir log_prefix log_config log_tracker_name log_tracker_config wandb_api_key wandb_run_name use_wandb "
             "no_metadata", "about logging"),
    _ignored("huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token "
             "huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload",
             "crumb uploads nothing"),
)

TABLE: tuple[Row, ...] = (*MODEL, *DATA, *CAPTIONS, *NETWORK, *TRAINING, *OPTIMIZER, *NOISE, *LOSS, *OUTPUT, *MACHINE)

KNOWN_KEYS = frozenset(key for row in TABLE for key in row.kohya)

FOREIGN_KEYS = frozenset([
    "ae", "clip_l", "clip_g", "t5xxl", "t5xxl_device", "t5xxl_dtype", "t5xxl_max_token_length", "t5_dropout_rate",
    "discrete_flow_shift", "guidance_scale", "model_prediction_type", "timestep_sampling", "sigmoid_scale", "split_mode",
    "split_qkv", "train_blocks", "train_t5xxl", "mem_eff_save", "apply_t5_attn_mask", "single_blocks_to_swap",
    "double_blocks_to_swap", "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "save_clip", "save_t5xxl",
    "clip_l_dropout_rate", "clip_g_dropout_rate", "enable_scaled_pos_embed", "pos_emb_random_crop_rate",
])
"""Keys of other model families, which the GUI lists in every preset."""
