"""Digits seen and heard: a small multi-modal model, its sensors corrupted, adapted by ABPEM. Run ``make demo``."""
