# What a TPU VM needs, run by its shell after streamt1_jax.tar.gz was copied there. To be sourced: `$INSTALL`.
# shellcheck shell=bash disable=SC2034
INSTALL='set -e
mkdir -p streamt1_jax && tar -xzf streamt1_jax.tar.gz -C streamt1_jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.12 venv
python3 -m uv pip install --quiet --python venv/bin/python -e "./streamt1_jax[tpu,gcs,tensorboard]"'
