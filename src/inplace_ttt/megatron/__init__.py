"""Everything that touches megatron-core.

Importing megatron-core without Transformer Engine or apex prints a page of warnings about what `launch/preflight.py`
and the README say in one table; they are silenced here, by their source, before anything imports it.
"""

import logging
import warnings

from inplace_ttt import te

for module in (r"megatron\.core", r"torch\.distributed"):
    warnings.filterwarnings("ignore", module=module)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # looks for CUDA's compiler
logging.getLogger("megatron").setLevel(logging.ERROR)  # deprecations of the container and of defaults we chose

te.unavailable_reason()  # raises UserError where megatron-core would die of it
