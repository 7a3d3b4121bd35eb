"""Weight files, read lazily and without running what they hold."""
