"""The same search on one device or many: meshes and what they shard."""
