"""Megatron's indexed dataset format for tokens: PREFIX.bin and PREFIX.idx."""

from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

__all__ = ["DType", "IndexedDataset", "IndexedDatasetBuilder"]
