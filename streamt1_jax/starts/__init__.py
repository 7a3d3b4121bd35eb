"""What a video may begin with instead of nothing: a file per kind, and a line in `table.STARTS`."""
