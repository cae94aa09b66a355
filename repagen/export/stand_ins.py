"""What stands in a copy for base classes of the library that deal with the Hub, which a copy leaves to diffusers."""

from __future__ import annotations


class PublishedMixin:
    """Base of pipelines: without the library's own `push_to_hub`."""


class PublishedModelMixin(PublishedMixin):
    """Base of models."""
