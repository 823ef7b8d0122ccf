"""Small models and batches, made alike on any number of ranks."""

import torch
from omegaconf import OmegaConf

from inplace_ttt.config import Config

VOCAB = 200
SEQ_LENGTH = 64
TINY = dict(
    model=dict(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        init_method_std=0.1,
    ),
    # eta: fast weights that matter, in a model whose training does not blow up rounding errors
    ttt=dict(layers="every 2nd", chunk_size=8, proj_init_std=0.3, eta=0.1),
    data=dict(seq_length=SEQ_LENGTH),
    optim=dict(lr=1e-3),
    train=dict(steps=20, global_batch_size=4),
    run=dict(name="test"),
)


def tiny_config(*changes: dict) -> Config:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), TINY, *changes))


class Training:
    """A model in training on random samples; fast weights are switched on by random convolutions."""

    def __init__(self, config: Config, impl: str = "local", dtype: torch.dtype = torch.float32):
        from inplace_ttt.megatron import runtime
        from inplace_ttt.megatron.initialize import initialize
        from inplace_ttt.megatron.model import build_model
        from inplace_ttt.megatron.optimizer import build_optimizer, wrap_data_parallel
        from inplace_ttt.megatron.step import Stepper

        self.config = config
        self.groups = runtime.start(config.parallel, config.train.seed)
        self.model = build_model(config, dtype, impl, VOCAB, self.groups)
        initialize(self.model, config, self.groups)
        for layer, module in self.model.ttt_modules.items():
            generator = torch.Generator().manual_seed(layer)
            # without a convolution the projection starts at 0, or the targets are the inputs
            weight = module.ttt_conv.weight if config.ttt.convolution else getattr(module.ttt_proj, "weight", None)
            if weight is not None:
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        wrapped = wrap_data_parallel(self.model, self.model.config, config)
        self.optimizer, self.scheduler = build_optimizer(wrapped, self.model.config, config)
        self.stepper = Stepper(config, wrapped, self.model.config, self.groups)

    def batches(self, step: int):
        """This rank's micro batches of a step: random tokens, some of which do not count, three documents or one."""
        from inplace_ttt.data.batch import MicroBatch, Sample
        from inplace_ttt.megatron.runtime import device

        generator = torch.Generator().manual_seed(step)
        samples, length = [], self.config.data.seq_length
        for _ in range(self.config.train.global_batch_size):
            text = torch.randint(0, VOCAB, (length + 1,), generator=generator)
            mask = (torch.rand(length, generator=generator) > 0.2).float()
            documents = (0, length * 3 // 8, length * 5 // 8, length) if self.config.data.reset_at_documents else None
            samples.append(Sample(text[:-1], text[1:], mask, documents))
        share, rank = len(samples) // self.groups.dp.size(), self.groups.dp.rank()
        mine, rows = samples[rank * share : (rank + 1) * share], self.config.train.micro_batch_size
        chunk_size, cp = self.config.ttt.chunk_size if self.config.ttt.enabled else None, self.groups.cp
        return [
            MicroBatch.collate(mine[i : i + rows], cp.size(), cp.rank(), chunk_size).to(device())
            for i in range(0, share, rows)
        ]

    def step(self, number: int) -> tuple[float, float]:
        """Loss and gradient norm of a step."""
        batches = self.batches(number)
        totals = self.stepper.train(iter(batches), len(batches))
        self.scheduler.step(increment=1)
        _, norm, _ = self.optimizer.step()
        self.optimizer.zero_grad()
        return totals.mean_loss, float(norm)


def train_losses(steps: int, *changes: dict, **options) -> list[tuple[float, float]]:
    training = Training(tiny_config(*changes), **options)
    return [training.step(number) for number in range(steps)]


def train_histograms(steps: int, *changes: dict) -> list[dict]:
    """Return each step's histograms of update norms, as metrics.jsonl has them."""
    from inplace_ttt.config import ttt_layers
    from inplace_ttt.training.update_histograms import take_counts, watch_updates

    training, found = Training(tiny_config(*changes)), []
    modules, layers = training.model.ttt_modules, ttt_layers(training.config.ttt, training.config.model.num_layers)
    for number in range(steps):
        watch_updates(modules, number != 1)
        training.step(number)
        found.append(take_counts(modules, layers, training.groups))
    return found
