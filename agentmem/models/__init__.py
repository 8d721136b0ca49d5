"""The default model, fetched once and used offline afterwards, and any other Hugging Face model."""

from agentmem.models.download import Progress
from agentmem.models.loading import (
    DEFAULT,
    cache_home,
    default_folder,
    default_licence,
    fetch_default,
    is_fetched,
    load,
    load_config,
)

__all__ = [
    "DEFAULT",
    "Progress",
    "cache_home",
    "default_folder",
    "default_licence",
    "fetch_default",
    "is_fetched",
    "load",
    "load_config",
]
