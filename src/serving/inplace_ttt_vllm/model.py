"""Model classes for vLLM, and the state of their requests."""

from functools import partial

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from inplace_ttt_vllm.mlp import FastWeightMLP, Slots, Step


class FastWeightState(DefaultModelState):
    """Give each request a slot of fast weights. vLLM calls the hooks outside of graphs."""

    def __init__(self, *args):
        super().__init__(*args)
        self.slots: Slots = self.model.slots
        self.layers = [module for module in self.model.modules() if isinstance(module, FastWeightMLP)]

    def add_request(self, req_index: int, new_req_data) -> None:
        """Clear the slot of a request that starts, or starts again after it was preempted."""
        super().add_request(req_index, new_req_data)
        if new_req_data.num_computed_tokens:
            raise RuntimeError("a request with fast weights starts after cached tokens: this is a bug of the plugin")
        self.slots.full_chunks[req_index] = 0
        for layer in self.layers:
            layer.clear(req_index)

    def prepare_inputs(self, input_batch, req_states) -> dict:
        """Apply the updates of complete chunks, and tell the layers which rows belong to which request."""
        number = input_batch.num_reqs
        slots = input_batch.idx_mapping_np[:number].tolist()
        computed = input_batch.num_computed_tokens_np[:number].tolist()
        starts = input_batch.query_start_loc_np[: number + 1].tolist()
        chunk, full = self.slots.chunk, self.slots.full_chunks
        for slot, tokens, start, stop in zip(slots, computed, starts[:-1], starts[1:], strict=True):
            if tokens // chunk > full[slot]:  # decoding completed a chunk
                for layer in self.layers:
                    layer.fold(slot)
            # the forward itself applies the chunks that several tokens complete, decoding leaves its last one
            full[slot] = (tokens + (stop - start if stop - start > 1 else 0)) // chunk
        self.slots.place(Step(slots, starts, computed))
        return super().prepare_inputs(input_batch, req_states)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict:
        """Prepare a forward without requests."""
        self.slots.place(None)
        return super().prepare_dummy_inputs(num_reqs, num_tokens)


def _keep(name: str, module: torch.nn.Module, inputs, embeds: torch.Tensor) -> torch.Tensor:
    """Copy the embeddings of a forward, as a hook of the embedding."""
    out = torch.empty_like(embeds)
    torch.ops.inplace_ttt.keep_embeddings(embeds, out, name)
    return out


class FastWeights:
    """Mix into a model class of vLLM: replace the MLPs of the layers with fast weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        device = next(self.parameters()).device
        self.slots = Slots(vllm_config.scheduler_config.max_num_seqs, config.ttt_chunk, device)
        here = [
            number for number in config.ttt_layers if hasattr(self.model.layers[number], "mlp")
        ]  # not of other stages
        for number in here:
            layer = self.model.layers[number]
            layer.mlp = FastWeightMLP(layer.mlp, config, number, self.slots, f"{prefix}.{number}")
        if config.ttt_target == "input_embed" and here:
            layer.mlp.is_last = True
            tokens = vllm_config.scheduler_config.max_num_batched_tokens
            self.slots.keep_embeddings(max(tokens, self.slots.number), config.hidden_size)
            self.model.embed_tokens.register_forward_hook(partial(_keep, layer.mlp.name))

    def load_weights(self, weights):
        """Load the weights of an exported folder."""
        loaded = super().load_weights(weights)
        for module in self.modules():
            if isinstance(module, FastWeightMLP):
                module.weight = module.down_proj.weight.detach()
        return loaded

    @staticmethod
    def get_model_state_cls() -> type[FastWeightState]:
        """Return the class of the state of requests, which vLLM's model runner creates."""
        return FastWeightState


class InPlaceTTTQwen3ForCausalLM(FastWeights, Qwen3ForCausalLM):
    """Run Qwen3 with fast weights."""


class InPlaceTTTLlamaForCausalLM(FastWeights, LlamaForCausalLM):
    """Run Llama with fast weights."""
