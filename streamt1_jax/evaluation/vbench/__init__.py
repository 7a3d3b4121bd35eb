"""Folders that VBench and VBench-Long take unchanged, and what their results say."""
