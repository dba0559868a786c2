"""Ranks: how they find each other, exchange rows, run ZeRO-3, and how a fault is told from a hang."""
