"""Searches compared at equal cost: pools of videos, what held-out judges say of them, and the statistics.

  plan (prompts, seeds, metric; fixed first) ── videos, each a row ── summary ── JSON, table, plots

Nothing in a reward, a search or a training may import what judges here.
"""
