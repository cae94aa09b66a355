"""Pipelines as folders that load where repagen is not installed."""

from __future__ import annotations
