"""Define constants shared by the operation and the memory estimate, without an import of torch."""

# Chunk weights are kept for the backward if they take at most this fraction of the free device memory, counting all
# layers whose saved chunk weights are alive at once
KEPT_SHARE = 0.125
# Bytes of chunk weights held at a time if they are not kept. Larger if ranks exchange carries, because ranks wait for
# each other's products between two windows
WINDOW_BYTES = 768 * 2**20
EXCHANGE_WINDOW_BYTES = 2 * WINDOW_BYTES
# The kernels need chunk sizes that are multiples of this: otherwise the last step of every chunk would be partly empty
CHUNK_MULTIPLE = 64
