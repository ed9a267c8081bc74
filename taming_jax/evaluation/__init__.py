"""Evaluation of a run: metrics of its reconstructions and samples."""
