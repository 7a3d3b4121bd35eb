"""Searches with names.

search = find("beam").settings(model, beam_size=4)
video = pipeline.generate("a red circle moves left over a dark blue background", search=search)
"""

from streamt1_jax.methods.spec import SEMANTICS, Method
from streamt1_jax.methods.table import METHODS, find

__all__ = ["METHODS", "SEMANTICS", "Method", "find"]
