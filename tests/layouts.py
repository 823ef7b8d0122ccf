"""Parallel layouts, and variants of the tiny model, as changes of its configuration."""


def parallel(**sizes):
    return {
        "parallel": {f"{name}_parallel_size" if name != "sequence_parallel" else name: n for name, n in sizes.items()}
    }


TP2 = parallel(tensor_model=2)
TP2_SP = parallel(tensor_model=2, sequence_parallel=True)
PP2 = parallel(pipeline_model=2)
CP2 = parallel(context=2)
CP4 = parallel(context=4)
CP2_TP2_SP = parallel(context=2, tensor_model=2, sequence_parallel=True)
CP2_PP2 = parallel(context=2, pipeline_model=2)
CP8 = parallel(context=8)
CP4_TP2_SP = parallel(context=4, tensor_model=2, sequence_parallel=True)
CP2_PP2_TP2_SP = parallel(context=2, pipeline_model=2, tensor_model=2, sequence_parallel=True)
FULL = {"train": {"recompute": "full"}}
SELECTIVE = {"train": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}}
CHEAP = {"train": {"recompute": "selective", "recompute_modules": ["layernorm", "mlp_act", "rope"]}}
PRODUCTS = {"train": {"recompute": "selective", "recompute_modules": ["layernorm", "mlp", "qkv"]}}
OVERLAP = {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
ONE_DOCUMENT = {"data": {"reset_at_documents": False}}
INPUT_EMBED = {"ttt": {"target": "input_embed"}}
UNTIED = {"model": {"tie_word_embeddings": False}}
