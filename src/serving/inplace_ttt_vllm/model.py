"""Define model classes for vLLM, and the state of their requests."""

from functools import partial

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from inplace_ttt_vllm.books import Books, Request, load_slot, save_state, state_of_slot
from inplace_ttt_vllm.mlp import FastWeightMLP, Slots, Step
from inplace_ttt_vllm.settings import check_graphs, check_runner

logger = init_logger(f"vllm.{__name__}")


class FastWeightState(DefaultModelState):
    """Give each request a slot of fast weights. vLLM calls the hooks outside of graphs."""

    def __init__(self, *args):
        super().__init__(*args)
        check_graphs(self.vllm_config.compilation_config)  # vLLM may have changed the mode since the first check
        self.slots: Slots = self.model.slots
        self.layers = [module for module in self.model.modules() if isinstance(module, FastWeightMLP)]
        self.books = Books(self.vllm_config)
        self.saves: dict[int, Request] = {}  # by slot: requests whose state is saved after their prompts
        self.complete: list[tuple[int, int]] = []  # slots whose states are saved after this forward, and their tokens

    def add_request(self, req_index: int, new_req_data) -> None:
        """Clear the slot of a request that starts, or starts again after it was preempted, and load its book."""
        super().add_request(req_index, new_req_data)
        if not self.layers:
            return
        self._clear(req_index)
        params, prompt = new_req_data.sampling_params, new_req_data.prompt_token_ids
        try:
            if new_req_data.num_computed_tokens:
                raise ValueError("it starts after cached tokens, of which there are no fast weights")
            request = self.books.begin(new_req_data.req_id, prompt, params.extra_args if params else None)
            if request.book is not None:
                load_slot(self.layers, req_index, request.book, get_tp_group().rank_in_group)
            if request.save is not None:
                self.saves[req_index] = request
        except Exception as error:  # no other request must fail
            logger.error("request %s gets an empty answer: %s", new_req_data.req_id, error)
            self._clear(req_index)
            self.slots.failed.add(req_index)

    def _clear(self, slot: int) -> None:
        slots = self.slots
        slots.chunks[slot] = slots.earlier[slot] = 0
        slots.loaded[slot] = False
        slots.failed.discard(slot)
        self.saves.pop(slot, None)
        for layer in self.layers:
            layer.clear(slot)

    def remove_request(self, req_id: str) -> None:
        """Forget what a request that ended loads and saves."""
        super().remove_request(req_id)
        self.books.end(req_id)

    def prepare_inputs(self, input_batch, req_states) -> dict:
        """Apply the updates of complete chunks, and tell the layers which rows belong to which request."""
        if not self.layers:
            return super().prepare_inputs(input_batch, req_states)
        number = input_batch.num_reqs
        slots = input_batch.idx_mapping_np[:number].tolist()
        computed = input_batch.num_computed_tokens_np[:number].tolist()
        starts = input_batch.query_start_loc_np[: number + 1].tolist()
        before = [self.slots.earlier[slot] + tokens for slot, tokens in zip(slots, computed, strict=True)]
        self.complete = []
        for row, slot in enumerate(slots):
            new = starts[row + 1] - starts[row]
            self.fold(slot, before[row])
            # the forward itself applies the chunks that several tokens complete, decoding leaves its last one
            if new > 1:
                self.slots.chunks[slot] = (before[row] + new) // self.slots.chunk
            request = self.saves.get(slot)
            if request is not None and computed[row] + new >= len(request.prompt):
                self.complete.append((slot, before[row] + new))
        self.slots.place(Step(slots, starts, before))
        return super().prepare_inputs(input_batch, req_states)

    def postprocess_state(self, *args) -> None:
        """Save the states of requests whose prompts are complete."""
        super().postprocess_state(*args)
        complete, self.complete = self.complete, []
        for slot, tokens in complete:
            self.fold(slot, tokens)
            found = state_of_slot(self.layers, slot, tokens)
            request = self.saves.pop(slot)
            if get_tp_group().rank_in_group == 0:
                save_state(self.books, found, request)
            request.save = None

    def fold(self, slot: int, tokens: int) -> None:
        """Apply the update of the chunk that decoding has completed, if the state of a slot has so many tokens."""
        done = self.slots.chunks[slot]
        if tokens // self.slots.chunk > done:
            for layer in self.layers:
                layer.fold(slot, done)
            self.slots.chunks[slot] = done + 1

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict:
        """Prepare a forward without requests."""
        if self.layers:
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
        check_runner(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.has_fast_weights, self.slots = config.ttt_mode and bool(config.ttt_layers), None
        self.end_of_text = config.eos_token_id
        if not self.has_fast_weights:
            return
        device = next(self.parameters()).device
        number = vllm_config.scheduler_config.max_num_seqs
        rows = max(number, vllm_config.compilation_config.max_cudagraph_capture_size or 0)  # graphs pad batches
        self.slots = Slots(number, rows, config.ttt_chunk, device)
        # not those of other pipeline stages
        here = [number for number in config.ttt_layers if hasattr(self.model.layers[number], "mlp")]
        for number in here:
            layer = self.model.layers[number]
            name = f"{prefix}.{number}.fast_weights"
            layer.mlp = FastWeightMLP(layer.mlp, config, number, self.slots, name)
            vllm_config.compilation_config.static_forward_context[name] = layer.mlp  # where the operations find it
        if config.ttt_target == "input_embed" and here:
            layer.mlp.is_last = True
            tokens = vllm_config.scheduler_config.max_num_batched_tokens
            self.slots.keep_embeddings(max(tokens, rows), config.hidden_size)
            self.model.embed_tokens.register_forward_hook(partial(_keep, layer.mlp.name))

    def load_weights(self, weights):
        """Load the weights of an exported folder."""
        if not self.has_fast_weights:  # ttt_mode: false
            weights = ((name, tensor) for name, tensor in weights if ".ttt_" not in name)
        loaded = super().load_weights(weights)
        for module in self.modules():
            if isinstance(module, FastWeightMLP):
                module.loaded_weight = module.down_proj.weight.detach()
        return loaded

    def compute_logits(self, hidden_states):
        """Return the logits (rows, vocabulary); those of requests that failed end the text at once."""
        logits = super().compute_logits(hidden_states)
        step = None if self.slots is None else self.slots.step
        if logits is not None and step is not None and self.slots.failed and len(logits) == len(step.slots):
            rows = [row for row, slot in enumerate(step.slots) if slot in self.slots.failed]
            ends = self.end_of_text if isinstance(self.end_of_text, list) else [self.end_of_text]
            if rows and ends[0] is not None:
                logits[rows] = -1e30
                logits[rows, ends[0]] = 0.0
        return logits

    @staticmethod
    def get_model_state_cls() -> type[FastWeightState]:
        """Return the class of the state of requests, which vLLM's model runner creates."""
        return FastWeightState


class InPlaceTTTQwen3ForCausalLM(FastWeights, Qwen3ForCausalLM):
    """Run Qwen3 with fast weights."""


class InPlaceTTTQwen2ForCausalLM(FastWeights, Qwen2ForCausalLM):
    """Run Qwen2.5 with fast weights."""


class InPlaceTTTLlamaForCausalLM(FastWeights, LlamaForCausalLM):
    """Run Llama with fast weights."""
