"""Read and write Megatron's indexed dataset format for tokens: PREFIX.bin and PREFIX.idx."""

from inplace_ttt import te

te.before_megatron_core()

from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder  # noqa: E402

__all__ = ["DType", "IndexedDataset", "IndexedDatasetBuilder"]
