"""Evaluation: questions answered in batches, written as they come, continued where they stopped, and scored."""
