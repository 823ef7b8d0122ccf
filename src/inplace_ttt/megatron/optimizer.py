"""Build AdamW with Megatron's (distributed) optimizer, and separate options for the fast-weight parameters."""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from inplace_ttt.config import Config, Optim, warmup_steps

TTT_NORM_GROUP = "ttt"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def wrap_data_parallel(model, megatron_config, config: Config) -> DistributedDataParallel:
    """Wrap a model for data parallelism: gradients in optim.main_grads_dtype, reduced over data- and context-parallel
    ranks. For bf16, also convert weights and inputs."""
    parallel = config.parallel
    if megatron_config.bf16:
        model = Float16Module(megatron_config, model)
    return DistributedDataParallel(
        megatron_config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            grad_reduce_in_fp32=config.optim.main_grads_dtype == "fp32",
            check_for_nan_in_grad=False,  # training/health.py names the layer
        ),
        model,
    )


def build_optimizer(model: DistributedDataParallel, megatron_config, config: Config):
    """Build the optimizer and its learning rate schedule: linear warm-up, cosine decay to ``lr * min_lr_ratio``."""
    optim = config.optim
    overrides = get_standard_config_overrides(OptimizerConfig(lr=optim.lr))
    if config.ttt.enabled:
        multiplier = config.ttt.lr_multiplier
        overrides[ParamKey(attr="is_ttt")] = {
            "max_lr": optim.lr * multiplier,
            "min_lr": optim.lr * optim.min_lr_ratio * multiplier,
            # Megatron matches checkpoint groups by their values: this separates the group if its rates equal the others
            "is_decoupled_lr": True,
        }
        if config.ttt.clip_separately:
            _clip_separately(model)
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.lr * optim.min_lr_ratio,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=megatron_config.bf16,
        params_dtype=megatron_config.params_dtype,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        **_precisions(optim),
    )
    optimizer = get_megatron_optimizer(optimizer_config, [model], config_overrides=overrides)
    # the unit of the schedule is steps
    warmup = warmup_steps(config)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.lr * optim.min_lr_ratio,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(round(optim.decay_fraction * config.train.steps), warmup + 1),
        lr_decay_style="cosine",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=config.train.steps,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def _precisions(optim: Optim) -> dict:
    """Return Megatron's options for gradients and moments that are not fp32.

    Master weights stay fp32: as the 16 bits that the weights lack, Megatron's checkpoints cannot load them. FP8 is left
    out: Transformer Engine's scale of a moment that is all zero is infinite, and the targets' projection has such
    moments in its first steps, as long as the convolution is zero.
    """
    if optim.main_grads_dtype == optim.moments_dtype == "fp32":
        return {}
    return dict(
        use_precision_aware_optimizer=True,
        store_param_remainders=False,
        main_grads_dtype=DTYPES[optim.main_grads_dtype],
        exp_avg_dtype=DTYPES[optim.moments_dtype],
        exp_avg_sq_dtype=DTYPES[optim.moments_dtype],
    )


def keep_current_hyperparameters(optimizer, loaded: dict) -> dict:
    """Return the loaded state with this start's hyperparameters (learning rates, betas, weight decay) in its groups.

    Megatron matches a checkpoint's groups by their learning rates and loads all their values. A run may be resumed with
    other hyperparameters, so only the step count is taken from the saved groups; it is the same in all of them.
    """
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    parts = [loaded] if len(chained) == 1 else [loaded[number] for number in range(len(chained))]
    for part, state in zip(chained, parts, strict=True):
        holder = state.get("optimizer", state)
        steps = [group["step"] for group in holder["param_groups"] if "step" in group]
        saved = dict(step=steps[0]) if steps else {}
        holder["param_groups"] = [{**group, **saved} for group in part.optimizer.state_dict()["param_groups"]]
    return loaded


def _clip_separately(model) -> None:
    """Clip the gradients of the fast-weight parameters by their own norm: Megatron does so per registered group."""
    groups = megatron_optimizer.SEPARATE_GRAD_NORM_GROUPS
    if TTT_NORM_GROUP not in groups:
        megatron_optimizer.SEPARATE_GRAD_NORM_GROUPS = (*groups, TTT_NORM_GROUP)
    for param in model.parameters():
        if getattr(param, "is_ttt", False):
            setattr(param, megatron_optimizer.GRAD_NORM_GROUP_ATTR, TTT_NORM_GROUP)
