"""Host memory of SGLang (0.5.23) on a machine without a GPU, which cannot register it for one. Never used on a GPU.

SGLang keeps the experts of cached tokens there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

TARGETS = {"sglang.srt.mem_cache.pool_host.common._cuda_host_register": "register_nothing"}
"""Each name under which SGLang looks a function up, and the function of this module that replaces it."""


def register_nothing(_buffer: Tensor, *_: Any) -> None:
    """Leaves the memory as it is."""
