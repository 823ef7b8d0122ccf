"""Implement ``launch/train.py``: parse the command line, train, and report errors in one sentence."""

from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from inplace_ttt.config import Config, UserError, ttt_layers
from inplace_ttt.environment import World, check_environment
from inplace_ttt.files import user_path
from inplace_ttt.resilience.exits import fail
from inplace_ttt.sizes import check_memory, choose_recompute_here, total_parameters

HELP = """\
torchrun [--nnodes N ...] --nproc-per-node N launch/train.py recipe=NAME [key=value ...]

  recipe=NAME   one of {recipes}
  key=value     any key of the configuration, such as train.steps=100 or parallel.context_parallel_size=2
  --cfg         print the configuration and stop
  --config-dir DIR   also use your own recipes, DIR/recipe/NAME.yaml

Without torchrun it runs one process. A run resumes from the last checkpoint in its run.dir."""


def main(arguments: list[str], recipes: Path) -> int:
    """Run the command line and return the exit code.

    0: training is done, or was stopped on request after saving a checkpoint. 2: the user must change something.
    3: the run stopped itself. 4: a failure that may be temporary (another rank, a file system).
    """
    from inplace_ttt.training.compose import compose_config, split_config_dir, to_config
    from inplace_ttt.validation import check_hardware, validate

    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP.format(recipes=", ".join(sorted(path.stem for path in (recipes / "recipe").glob("*.yaml")))))
        return 0
    show = "--cfg" in arguments
    overrides = [argument for argument in arguments if argument not in ("--cfg", "job")]
    try:
        overrides, folders = split_config_dir(overrides, recipes)
        composed = compose_config(overrides, folders)
        config = to_config(composed)
        if show:
            print(OmegaConf.to_yaml(composed, resolve=True), end="")
            return 0
        world = World.from_environment()
        check_environment()
        validate(config, world.size)
        check_hardware(config)
        return train(config, world)
    except UserError as error:
        return fail(f"error: {error}", 2)


def train(config: Config, world: World) -> int:
    """Train a validated configuration and return the exit code. Collective, with equal arguments on all ranks."""
    from inplace_ttt.job import run_job
    from inplace_ttt.training.timeline import Timeline

    return run_job(
        lambda job: _train(config, job),
        world,
        config.parallel.timeout_minutes,
        output=f"run.dir='{config.run.dir}'",
        note_end=lambda why: Timeline(user_path(config.run.dir)).end(why),
    )


def _train(config: Config, job) -> int:
    from inplace_ttt.data.build import open_corpora
    from inplace_ttt.job import SLOW_PHASE_FACTOR
    from inplace_ttt.training.run_folder import RunFolder

    watchdog = job.watchdog
    watchdog.set_phase("opening the data", SLOW_PHASE_FACTOR)
    corpora = open_corpora(config)
    config.model.vocab_size = corpora.vocab_size
    check_memory(config, job.world)
    groups = job.start(config.parallel, config.train.seed)
    watchdog.set_phase("opening the run's folder", SLOW_PHASE_FACTOR)
    folder = RunFolder(config, corpora.identity)
    try:
        return _train_in(folder, config, corpora, groups, job.stop, watchdog)
    finally:
        folder.close()


def _train_in(folder, config: Config, corpora, groups, stop, watchdog) -> int:
    from inplace_ttt.data.build import build_splits
    from inplace_ttt.fit import describe_recompute
    from inplace_ttt.job import SLOW_PHASE_FACTOR
    from inplace_ttt.megatron.checkpoint import Checkpointer
    from inplace_ttt.megatron.initialize import initialize
    from inplace_ttt.megatron.model import build_model
    from inplace_ttt.megatron.optimizer import build_optimizer, wrap_data_parallel
    from inplace_ttt.megatron.runtime import on_first_rank, raise_on_all_ranks
    from inplace_ttt.megatron.step import Stepper
    from inplace_ttt.training.loop import Recorder, Trainer
    from inplace_ttt.training.loss_plot import plot_loss
    from inplace_ttt.validation import precision, transformer_impl

    watchdog.set_phase("checking the data", SLOW_PHASE_FACTOR)
    on_first_rank(corpora.check_tokens)
    sets = build_splits(config, corpora, folder.packing)
    watchdog.set_phase("building the model", SLOW_PHASE_FACTOR)
    built = choose_recompute_here(config)
    if built is not config:
        on_first_rank(lambda: print(f"train.recompute=auto: {describe_recompute(built)}", flush=True))
    model = build_model(built, precision(config), transformer_impl(config), sets.vocab_size, groups)
    initialize(model, config, groups)
    megatron_config = model.config
    wrapped = wrap_data_parallel(model, megatron_config, config)
    optimizer, scheduler = build_optimizer(wrapped, megatron_config, config)
    checkpointer = Checkpointer(
        folder.checkpoints,
        model,
        optimizer,
        groups,
        keep=config.checkpoint.keep,
        async_save=config.checkpoint.async_save,
        corrupt=folder.corrupt,
    )
    watchdog.set_phase("loading a checkpoint", SLOW_PHASE_FACTOR)
    step, notes = 0, [*folder.notes, *_notes_of_data(config, corpora, sets)]
    if folder.resume_from is not None:
        step = checkpointer.resume(folder.resume_from).step
        scheduler.step(increment=step)
        notes.append(f"resuming from step {step} ('{folder.resume_from}')")
        if step >= config.train.steps:
            notes.append(f"all train.steps={config.train.steps} steps are done: raise train.steps to continue")
    elif config.checkpoint.load is not None:
        new, stored = checkpointer.load_weights(user_path(config.checkpoint.load))
        raise_on_all_ranks(_trained_convolution(config, model))
        initialised = f"; {len(new)} tensors are newly initialised" if new else ""
        notes.append(f"initialised from '{config.checkpoint.load}'{initialised}")
        notes += _dropped(config, stored)

    watchdog.set_phase("opening metrics and W&B")
    recorder = Recorder(config, asdict(config), folder, step)
    folder.record(config)
    recorder.say(_describe(config, model, groups))
    for note in notes:
        recorder.say(note)
    stepper = Stepper(config, wrapped, megatron_config, groups)
    loop = Trainer(config, sets, stepper, optimizer, scheduler, checkpointer, recorder, folder, stop, watchdog, groups)
    try:
        finished = loop.run(step)
    finally:
        watchdog.set_phase("closing metrics and W&B", SLOW_PHASE_FACTOR)
        recorder.close()
    if finished and recorder.outputs:
        watchdog.set_phase("drawing loss.png")
        plot_loss(folder.metrics, folder.path / "loss.png", config.run.name)
        print(f"done: see metrics.jsonl, loss.png and checkpoints/ in '{folder.path}'", flush=True)
    return 0


def _describe(config: Config, model, groups) -> str:
    import torch
    import torch.distributed as dist

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return (
        f"{config.run.name}: {total_parameters(config) / 1e6:,.1f}M parameters, {dist.get_world_size()} x {where}, "
        f"TP {groups.tp.size()} PP {groups.pp.size()} CP {groups.cp.size()} DP {groups.dp.size()}, "
        f"{config.train.global_batch_size} x {config.data.seq_length} tokens per step, "
        + (
            f"fast weights in layers {ttt_layers(config.ttt, config.model.num_layers)}"
            if config.ttt.enabled
            else "no fast weights"
        )
    )


def _notes_of_data(config: Config, corpora, sets) -> list[str]:
    """Return notes on the data: sources that repeat, keys that are ignored, and a missing held-out loss."""
    notes = []
    for source, epochs in zip(config.data.sources, sets.epochs, strict=False):
        if epochs > 1.0:
            notes.append(f"'{source.path}' is read {epochs:.1f} times in {config.train.steps} steps")
    for name, epochs in zip(sets.held_out, sets.held_out_epochs, strict=True):
        if epochs > 1.0:
            notes.append(
                f"each evaluation reads the held-out data of '{name}' {epochs:.1f} times: train.eval_samples="
                f"{config.train.eval_samples} is more than there are"
            )
    trained = [one.identity for one in corpora.sources]
    notes += [
        f"data.validation: '{one.prefix}' has the same content as one of data.sources: its loss is not a held-out loss"
        for one in corpora.validation
        if one.identity in trained
    ]
    if config.data.kind == "recall" and (config.data.sources or config.data.validation or config.data.tokenizer):
        notes.append("data.kind=recall generates its data: data.sources, validation and tokenizer are ignored")
    if sets.validation is None:
        why = "train.eval_samples=0" if not config.train.eval_samples else "a source has no held-out documents"
        notes.append(f"no held-out loss: {why}")
    return notes


def _trained_convolution(config: Config, model) -> UserError | None:
    """Return an error if loaded weights have a trained target convolution, and the configuration has none."""
    from inplace_ttt.ttt.target import identity_kernel

    if config.ttt.convolution:
        return None
    for layer, module in model.ttt_modules.items():
        kernel = module.ttt_conv.weight.detach().float().cpu()
        if not kernel.equal(identity_kernel(tuple(kernel.shape))):
            return UserError(
                f"checkpoint.load='{config.checkpoint.load}' has a trained target convolution in layer {layer}, and "
                f"ttt.convolution=false keeps it out: use true, or a checkpoint without fast weights"
            )
    return None


def _dropped(config: Config, stored: list[str]) -> list[str]:
    """Return a note on the fast-weight tensors of a checkpoint that this run's model does not have."""
    layers = ttt_layers(config.ttt, config.model.num_layers)

    def has_place(name: str) -> bool:
        return int(name.split(".")[2]) in layers and (config.ttt.project or ".ttt_proj." not in name)

    dropped = [name for name in stored if not has_place(name)]
    if not dropped:
        return []
    more = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
    return [f"not loaded, because the model has no such fast weights: {dropped[0]}{more}"]
