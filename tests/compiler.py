"""How XLA compiles a test's own program."""

OPTIMISED = {"xla_backend_optimization_level": 2}
"""`compiler_options` of `jax.jit` for what takes longer to run than to compile: `conftest` turns optimisation off."""
