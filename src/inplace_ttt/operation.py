"""Constants of the operation that its code and the estimates of memory share; torch is not needed for them."""

# Chunk weights are kept for the backward where they take no more than this share of the free device memory, counting
# all layers whose saved chunk weights are alive at once
KEPT_SHARE = 0.125
# Bytes of chunk weights held at a time where they are not kept; more where carries are exchanged between ranks, which
# would wait for each other's products between one window and the next
WINDOW_BYTES = 768 * 2**20
EXCHANGE_WINDOW_BYTES = 2 * WINDOW_BYTES
# Kernels take chunk sizes that are multiples of this: of others the last step of every chunk would be partly empty
CHUNK_MULTIPLE = 64
