"""Metrics of any video that need no download: motion, flicker, coherence over time, exposure, and how they drift.

No reward and no training may use them: they are what a search is judged by afterwards.
"""
