"""All code that uses megatron-core.

Without Transformer Engine or apex, megatron-core prints warnings about missing packages, which `launch/preflight.py`
reports. This module silences them, by their source, before megatron-core is imported.
"""

import logging
import warnings

from inplace_ttt import te

for module in (r"megatron\.core", r"torch\.distributed"):
    warnings.filterwarnings("ignore", module=module)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns if there is no CUDA compiler
logging.getLogger("megatron").setLevel(logging.ERROR)  # deprecation warnings about the container and our settings

te.unavailable_reason()  # raises UserError if a broken install would make the import of megatron-core fail
