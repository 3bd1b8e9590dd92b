"""The pipelines and models measured against their peers."""
