"""Ablation sweeps: many layer configurations of one model in one pass, scored and made to speak."""
