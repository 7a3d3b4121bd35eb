"""What a search will take of a device, known before a weight is read and before anything is compiled."""
