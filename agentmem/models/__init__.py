"""Fetch the default model once, to use it offline afterwards, and load it or any other Hugging Face model."""

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
