"""Build the model: Megatron's GPTModel with TTT layers, positions per document, and a loss without all logits."""

from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from inplace_ttt.config import Config, Model, linear_attention_sizes, padded_vocab_size, recomputed_modules, ttt_layers
from inplace_ttt.megatron.batch_context import BatchContext
from inplace_ttt.megatron.layer import backend_modules, block_spec
from inplace_ttt.megatron.loss import linear_cross_entropy
from inplace_ttt.megatron.mlp import TTTMLP
from inplace_ttt.megatron.rope import RotaryEmbedding, rope_frequencies
from inplace_ttt.models import family_of
from inplace_ttt.ttt.layout import SequenceLayout


def transformer_config(config: Config, dtype: torch.dtype) -> TransformerConfig:
    """Return Megatron's configuration of the model and its parallel layout.

    Args:
        dtype: of parameters and activations.
    """
    model, parallel, train = config.model, config.parallel, config.train
    if train.recompute == "auto":
        raise ValueError("train.recompute=auto is replaced by a choice first: see sizes.py")
    recompute = {}
    if train.recompute == "full":
        recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    again = recomputed_modules(train)
    if "core_attn" in again.modules:
        recompute = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    on_gpu = torch.cuda.is_available()
    megatron_config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        window_size=None if model.sliding_window is None else (model.sliding_window - 1, 0),
        window_attn_skip_freq=model.window_attn_skip_freq,
        **_linear_attention(model),
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp8=train.fp8,
        fp8_recipe=train.fp8_recipe,
        calculate_per_token_loss=True,  # exact mean over the tokens of all data- and context-parallel ranks
        hetereogenous_dist_checkpoint=True,  # (sic) layers differ: checkpoint keys are per layer
        perform_initialization=False,  # initialize.py does it
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False,  # needs apex; _fuse_weight_gradients does it with Transformer Engine
        softmax_scale=_softmax_scale(config),
        bias_dropout_fusion=False,  # the model has neither bias nor dropout
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **family_of(model).megatron,
        **recompute,
        cpu_offloading=train.offload_layers > 0,  # activations, not weights
        cpu_offloading_num_layers=train.offload_layers,
    )
    megatron_config.recomputed = again  # see layer.py
    megatron_config.keep_core_attn = train.recompute == "full" and not train.recompute_core_attn  # see attention.py
    return megatron_config


def _linear_attention(model: Model) -> dict:
    sizes = linear_attention_sizes(model)
    if sizes is None:
        return {}
    return dict(
        linear_num_key_heads=sizes.heads,
        linear_num_value_heads=sizes.heads,
        linear_key_head_dim=sizes.key_dim,
        linear_value_head_dim=sizes.value_dim,
        linear_conv_kernel_dim=sizes.kernel,
    )


def _softmax_scale(config: Config) -> float:
    """Return the scale of attention scores. It contains the square of YaRN's attention factor, which is not in the
    cosines and sines of RoPE."""
    _, attention_factor = model_rope(config)
    return attention_factor**2 * config.model.kv_channels**-0.5


def model_rope(config: Config) -> tuple[Tensor, float]:
    """Return RoPE's inverse frequencies (kv_channels / 2,) and YaRN's attention factor for a configuration."""
    return rope_frequencies(config.model, config.model.max_position_embeddings or config.data.seq_length)


class TTTGPTModel(GPTModel):
    """Extend Megatron's GPTModel: pass positions, sequence layout and embedding output to the layers.

    With ``target: input_embed`` every layer gets the embedding output X0. Pipeline stages send it together with the
    hidden states, as (s, b, 2 h).
    """

    def __init__(
        self, config: Config, megatron_config, block, *, vocab_size: int, pg_collection, pre_process, post_process
    ):
        super().__init__(
            megatron_config,
            block,
            padded_vocab_size(vocab_size),
            config.data.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=config.model.tie_word_embeddings,
            position_embedding_type="none",  # self.rope computes it from position_ids
            pg_collection=pg_collection,
        )
        self.true_vocab_size, self.chunk_size = vocab_size, config.ttt.chunk_size
        self.rope = RotaryEmbedding(model_rope(config)[0])
        self.carries_input_embed = bool(ttt_layers(config.ttt, config.model.num_layers)) and (
            config.ttt.target == "input_embed"
        )
        self._received_input_embed: Tensor | None = None
        for mlp in self.ttt_modules.values():
            mlp.kept_layers = len(self.ttt_modules) * config.parallel.pipeline_model_parallel_size

    @property
    def ttt_modules(self) -> dict[int, TTTMLP]:
        """Return the TTT-MLPs of this pipeline stage by layer index in the whole model, from 0."""
        return {layer.layer_number - 1: layer.mlp for layer in self.decoder.layers if isinstance(layer.mlp, TTTMLP)}

    def set_input_tensor(self, input_tensor):
        """Set the input of this pipeline stage. Split off the embedding output if the stages send it, (s, b, 2 h)."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if self.carries_input_embed and tensor is not None:
            tensor, self._received_input_embed = tensor.chunk(2, dim=-1)
            tensor = tensor.contiguous()
        super().set_input_tensor(tensor)

    def _preprocess(self, input_ids, position_ids, *args, **kwargs):
        hidden, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        return hidden, self.rope(position_ids), *rest

    def forward(
        self,
        input_ids: Tensor,  # (b, s), this rank's tokens
        position_ids: Tensor,  # (b, s)
        layout: SequenceLayout,
        labels: Tensor | None = None,  # (b, s)
        counts: Tensor | None = None,  # (b, s) bool: tokens whose losses are summed; None: all
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Run this pipeline stage.

        Returns:
            The last stage with labels: the sum of losses (), the loss of each token (b, s), and 1 if its label has the
            highest logit, else 0, (b, s), all fp32; only the sum has a gradient. The last stage without labels: logits
            (b, s, vocabulary / TP). Other stages: hidden states (s, b, h), or (s, b, 2 h) with the embedding output.
        """
        embedded = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        context = None
        if self.carries_input_embed:
            context = embedded if self.pre_process else self._received_input_embed
            self._received_input_embed = None
        if self.ttt_modules and layout.plan is None:
            cp = self.pg_collection.cp
            layout = layout.with_plan(input_ids.shape[1] * cp.size(), self.chunk_size, cp.size(), cp.rank())
        out = super().forward(
            input_ids,
            position_ids,
            None,
            embedded,
            labels=labels,
            packed_seq_params=BatchContext(layout=layout.to(input_ids.device)),
            extra_block_kwargs={"context": context},
            output_processor=None if labels is None else partial(self._loss, counts),
        )
        if self.carries_input_embed and not self.post_process:
            return torch.cat([out, context], dim=-1)
        return out

    def _loss(self, counts, *, hidden_states, output_layer, output_weight, labels, config, **_):
        return linear_cross_entropy(
            hidden_states,
            output_layer.weight if output_weight is None else output_weight,
            labels,
            counts,
            vocab_size=self.true_vocab_size,
            tp_group=self.pg_collection.tp,
            sequence_parallel=config.sequence_parallel,
        )


def _fuse_weight_gradients(model: TTTGPTModel) -> None:
    """Make Transformer Engine's linears accumulate weight gradients into the fp32 buffers in their own GEMMs.

    Megatron's option for this would also apply to Megatron's own linears, which need apex for it.
    """
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    for module in model.modules():
        if isinstance(module, TransformerEngineBaseModule) and hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def build_model(
    config: Config, dtype: torch.dtype, transformer_impl: str, vocab_size: int, pg_collection
) -> TTTGPTModel:
    """Build this rank's shard of the model. Its parameters are not initialised.

    Args:
        dtype: of parameters and activations.
        transformer_impl: ``local`` or ``transformer_engine``.
        vocab_size: without padding.
    """
    megatron_config = transformer_config(config, dtype)
    pp_rank, pp_size = pg_collection.pp.rank(), pg_collection.pp.size()
    block = block_spec(
        megatron_config,
        backend_modules(transformer_impl),
        config.ttt,
        ttt_layers(config.ttt, config.model.num_layers),
        pp_rank,
        linear_attention=config.model.attention == "gated_delta_net",
    )
    model = TTTGPTModel(
        config,
        megatron_config,
        block,
        vocab_size=vocab_size,
        pg_collection=pg_collection,
        pre_process=pp_rank == 0,
        post_process=pp_rank == pp_size - 1,
    )
    if transformer_impl == "transformer_engine":
        _fuse_weight_gradients(model)
    return model.cuda() if torch.cuda.is_available() else model
