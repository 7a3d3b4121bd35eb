"""What evaluations of videos and rewards share."""
