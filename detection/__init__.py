"""Checkpoint → Detectron2. Empty until the converter and its configs move in."""
