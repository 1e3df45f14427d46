"""Evaluation of a trained model: perplexity with intervals, two models compared, tasks."""
